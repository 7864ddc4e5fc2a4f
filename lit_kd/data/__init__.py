"""Data modules whose batches tell each sample's index, with label noise and a trusted meta split."""

from lit_kd.types import UNLABELED, Batch, as_batch

from .base import DataModule, data_of
from .drawn import OutliersDataModule, ShapesDataModule, TagsDataModule
from .folder import ImageFolderDataModule
from .foreign import DistillationDataModule
from .hub import HFDatasetModule
from .labels import corrupt, draw_soft_labels, stratified_split, transition_matrix
from .partition import Source
from .rows import ItemRows, Rows, TensorRows
from .sampler import EpochSampler
from .sequences import SumsDataModule
from .small import BlobsDataModule, DigitAttributesDataModule, DigitsDataModule, GMMDataModule, SpiralDataModule
from .table import SampleTable
from .tables import CSVDataModule
from .vision import CIFAR10DataModule, CIFAR100DataModule, FashionMNISTDataModule, MNISTDataModule
from .worlds import PopularItemsDataModule, SymbolSequencesDataModule

__all__ = [
    "UNLABELED",
    "Batch",
    "BlobsDataModule",
    "CIFAR10DataModule",
    "CIFAR100DataModule",
    "CSVDataModule",
    "DataModule",
    "DigitAttributesDataModule",
    "DigitsDataModule",
    "DistillationDataModule",
    "EpochSampler",
    "FashionMNISTDataModule",
    "GMMDataModule",
    "HFDatasetModule",
    "ImageFolderDataModule",
    "ItemRows",
    "MNISTDataModule",
    "OutliersDataModule",
    "PopularItemsDataModule",
    "Rows",
    "SampleTable",
    "ShapesDataModule",
    "Source",
    "SpiralDataModule",
    "SumsDataModule",
    "SymbolSequencesDataModule",
    "TagsDataModule",
    "TensorRows",
    "as_batch",
    "corrupt",
    "data_of",
    "draw_soft_labels",
    "stratified_split",
    "transition_matrix",
]
