"""Every model by its key in recipes and manifests."""

from models.afm import AFM
from models.base import Model
from models.fm import FM
from models.ifm import IFM
from models.lr import LR
from models.nfm import NFM

MODELS: dict[str, type[Model]] = {"lr": LR, "fm": FM, "nfm": NFM, "afm": AFM, "ifm": IFM}
