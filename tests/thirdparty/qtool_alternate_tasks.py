"""A task for qtool: reviews of our own, in files with the columns `review` and `stars`."""

from qtool.evaluation.tasks import Task

REVIEWS = Task(
    name="reviews",
    kind="sequence-classification",
    description="one or five stars for a review",
    text_columns=("review",),
    label_column="stars",
    labels=("negative", "positive"),
    metrics=("f1", "accuracy"),
)
