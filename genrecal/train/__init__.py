"""The trainer: student, Recalibrator and the teacher's frozen head. Never needs the teacher, never imports `cache`."""
