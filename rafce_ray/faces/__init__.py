"""From bytes to upright pixels to aligned faces."""

MIN_FACE_SCORE = 0.8
"""YuNet's confidence, 0 to 1, from which a box counts as a face by default.

Here, since the command line names it and imports nothing heavy.
"""
