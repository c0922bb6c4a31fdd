"""The learner: DeepSpeed ranks as Ray actors behind one handle, `group.LearnerGroup`.

Knows no algorithm names and no teachers: it executes per-token streams.
"""
