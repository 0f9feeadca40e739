"""Fine-tuning of the trainable form: what is minimised, how it is averaged, and how a killed run goes on.

In: a student from `lmfx.rewrite`, its teacher, and batches. Out: the same student, trained; `lmfx.merge` makes the
deploy form of it.
"""
