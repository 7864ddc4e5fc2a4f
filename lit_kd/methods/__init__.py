"""The methods, one file each: terms, weights, and what is special."""

from lit_kd.methods.adversarial import AdversarialKD
from lit_kd.methods.almkd import ALMKD
from lit_kd.methods.attention_transfer import AttentionTransfer
from lit_kd.methods.cat_kd import CATKD
from lit_kd.methods.comparative_kd import ComparativeKD
from lit_kd.methods.crd import CRD
from lit_kd.methods.cross import cross_predict, cross_relabel
from lit_kd.methods.crowd import CrowdLabels
from lit_kd.methods.ctkd import CTKD
from lit_kd.methods.dist import DIST
from lit_kd.methods.dkd import DKD
from lit_kd.methods.dot import DOT
from lit_kd.methods.element_trust import ElementTrust
from lit_kd.methods.fitnet import FitNet
from lit_kd.methods.gkd import GKD
from lit_kd.methods.glc import GLC
from lit_kd.methods.group_distil import GroupDistil
from lit_kd.methods.kd import KD
from lit_kd.methods.label_revision import LabelRevision
from lit_kd.methods.lelp import LELP
from lit_kd.methods.loss_divider import LossDivider
from lit_kd.methods.mcmi import MCMI
from lit_kd.methods.mixin import Distilled
from lit_kd.methods.mixkd import MixKD
from lit_kd.methods.multi_level_kd import MultiLevelKD
from lit_kd.methods.mutual import MutualLearning
from lit_kd.methods.nkd import NKD
from lit_kd.methods.online_kd import OnlineKD
from lit_kd.methods.oracle_ctc import OracleCTC
from lit_kd.methods.pkt import PKT
from lit_kd.methods.rad import RobustActiveDistillation
from lit_kd.methods.review_kd import ReviewKD
from lit_kd.methods.reweighting import L2RW, MetaWeightNet
from lit_kd.methods.rkd import RKD
from lit_kd.methods.sdd import SDD
from lit_kd.methods.sequence_kd import SequenceKD
from lit_kd.methods.similarity_preserving import SimilarityPreserving
from lit_kd.methods.simkd import SimKD
from lit_kd.methods.slam import SLaM
from lit_kd.methods.small_loss import CoTeaching, JoCoR
from lit_kd.methods.speculative_kd import SpeculativeKD
from lit_kd.methods.srrl import SRRL
from lit_kd.methods.step_by_step import StepByStep
from lit_kd.methods.supervised import Supervised
from lit_kd.methods.unkd import UnKD
from lit_kd.methods.vid import VID
from lit_kd.methods.weighted import WeightedDistillation
from lit_kd.methods.wsld import WSLD

__all__ = [
    "ALMKD",
    "CATKD",
    "CRD",
    "CTKD",
    "DIST",
    "DKD",
    "DOT",
    "GKD",
    "GLC",
    "KD",
    "L2RW",
    "LELP",
    "MCMI",
    "NKD",
    "PKT",
    "RKD",
    "SDD",
    "SRRL",
    "VID",
    "WSLD",
    "AdversarialKD",
    "AttentionTransfer",
    "CoTeaching",
    "ComparativeKD",
    "CrowdLabels",
    "Distilled",
    "ElementTrust",
    "FitNet",
    "GroupDistil",
    "JoCoR",
    "LabelRevision",
    "LossDivider",
    "MetaWeightNet",
    "MixKD",
    "MultiLevelKD",
    "MutualLearning",
    "OnlineKD",
    "OracleCTC",
    "ReviewKD",
    "RobustActiveDistillation",
    "SLaM",
    "SequenceKD",
    "SimKD",
    "SimilarityPreserving",
    "SpeculativeKD",
    "StepByStep",
    "Supervised",
    "UnKD",
    "WeightedDistillation",
    "cross_predict",
    "cross_relabel",
]
