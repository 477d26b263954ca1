"""No teacher: the data is all there is (supervised fine-tuning)."""

from __future__ import annotations

from typing import Literal

from limbeck.teachers.base import Teacher


class NoTeacher(Teacher):
    """Provides nothing; an objective that needs a teacher is refused with it."""

    type: Literal["none"] = "none"
