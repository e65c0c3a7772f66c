"""The methods, one file each.  A plain dictionary, so that `grep` finds everything."""

from patchmine.methods.amt import AMT
from patchmine.methods.droppos import DropPos
from patchmine.methods.emae import EMAE
from patchmine.methods.hpm import HPM
from patchmine.methods.mae import MAE
from patchmine.methods.mokd import MOKD
from patchmine.methods.scfs import SCFS
from patchmine.methods.semaim import SemAIM
from patchmine.methods.simmim import SimMIM
from patchmine.task import Method

METHODS: dict[str, type[Method]] = {
    "mae": MAE,
    "hpm": HPM,
    "simmim": SimMIM,
    "amt": AMT,
    "emae": EMAE,
    "droppos": DropPos,
    "semaim": SemAIM,
    "mokd": MOKD,
    "scfs": SCFS,
}
