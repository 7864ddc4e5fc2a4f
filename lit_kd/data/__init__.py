"""Data modules whose batches tell each sample's index, with label noise and a trusted meta split."""

from lit_kd.data.base import DataModule, data_of
from lit_kd.data.digits import DigitAttributesDataModule, DigitsDataModule
from lit_kd.data.folder import ImageFolderDataModule
from lit_kd.data.foreign import DistillationDataModule
from lit_kd.data.noise import corrupt, transition_matrix
from lit_kd.data.partition import Source
from lit_kd.data.rows import ItemRows, Rows, TensorRows
from lit_kd.data.sampler import EpochSampler
from lit_kd.data.splits import stratified_split
from lit_kd.data.synthetic import BlobsDataModule, GMMDataModule, SpiralDataModule
from lit_kd.data.table import SampleTable
from lit_kd.data.vision import CIFAR10DataModule, CIFAR100DataModule, FashionMNISTDataModule, MNISTDataModule
from lit_kd.types import UNLABELED, Batch, as_batch

__all__ = [
    "UNLABELED",
    "Batch",
    "BlobsDataModule",
    "CIFAR10DataModule",
    "CIFAR100DataModule",
    "DataModule",
    "DigitAttributesDataModule",
    "DigitsDataModule",
    "DistillationDataModule",
    "EpochSampler",
    "FashionMNISTDataModule",
    "GMMDataModule",
    "ImageFolderDataModule",
    "ItemRows",
    "MNISTDataModule",
    "Rows",
    "SampleTable",
    "Source",
    "SpiralDataModule",
    "TensorRows",
    "as_batch",
    "corrupt",
    "data_of",
    "stratified_split",
    "transition_matrix",
]
