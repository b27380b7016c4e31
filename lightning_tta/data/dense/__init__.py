"""Images whose answers are more than one class an image: masks of segmentation, and values of regression."""
