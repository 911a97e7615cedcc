"""Every model by its key in recipes and manifests."""

from models.afm import AFM
from models.base import Model
from models.crossfit import Crossfit
from models.deep_cross import DeepCross
from models.deep_fm import DeepFM
from models.deep_ifm import DeepIFM
from models.ensemble import Ensemble
from models.ffm import FFM
from models.fm import FM
from models.fwnfm import FwNFM
from models.hofm import HOFM
from models.ifm import IFM
from models.inn import INN
from models.interaction_fm import InteractionFM
from models.lr import LR
from models.nfm import NFM
from models.wide_deep import WideDeep

MODELS: dict[str, type[Model]] = {
    "lr": LR,
    "fm": FM,
    "ffm": FFM,
    "hofm": HOFM,
    "nfm": NFM,
    "afm": AFM,
    "ifm": IFM,
    "interaction_fm": InteractionFM,
    "inn": INN,
    "deep_ifm": DeepIFM,
    "wide_deep": WideDeep,
    "deep_cross": DeepCross,
    "deep_fm": DeepFM,
    "fwnfm": FwNFM,
    "ensemble": Ensemble,
    "crossfit": Crossfit,
}
