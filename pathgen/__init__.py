"""From patches to image-caption pairs: PathGen's annotations and what is made of them."""
