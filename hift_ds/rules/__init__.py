"""Update rules: the maths of each optimizer on a block's flat fp32 shard. Needs torch only."""

from hift_ds.rules.adafactor import Adafactor
from hift_ds.rules.adagrad import Adagrad
from hift_ds.rules.adam import Adam
from hift_ds.rules.base import Rule
from hift_ds.rules.lion import Lion
from hift_ds.rules.sgd import SGD

__all__ = ["SGD", "Adafactor", "Adagrad", "Adam", "Lion", "Rule"]
