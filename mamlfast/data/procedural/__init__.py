"""The embedded suite of procedurally generated tasks, in MetaICL's format; it needs no data and no network."""

from mamlfast.data.procedural.suite import FAMILIES as FAMILIES
from mamlfast.data.procedural.suite import UNSEEN_FAMILIES as UNSEEN_FAMILIES
from mamlfast.data.procedural.suite import family_of as family_of
from mamlfast.data.procedural.suite import procedural_suite as procedural_suite
