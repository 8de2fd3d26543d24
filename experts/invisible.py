"""Characters that draw nothing, beyond Unicode's control and format characters.

Two names that differ in one of them look the same: manifests may not hold them, and terminals show their escapes.
"""

INVISIBLE = frozenset("\u034f\u115f\u1160\u17b4\u17b5\u180b\u180c\u180d\u180f\u2800\u3164\uffa0")
