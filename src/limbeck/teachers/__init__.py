"""Teachers: who scores the tokens."""

from limbeck.teachers.base import Provides, Scorer, Teacher
from limbeck.teachers.distillkit import DistillKitTeacher
from limbeck.teachers.model import ModelTeacher
from limbeck.teachers.none import NoTeacher
from limbeck.teachers.server import ServerTeacher
from limbeck.teachers.store import StoreTeacher

__all__ = ["DistillKitTeacher", "ModelTeacher", "NoTeacher", "Provides", "Scorer", "ServerTeacher", "StoreTeacher", "Teacher"]
