"""`xtuner-add demo-pathgen`: PathGen-1.6M at the size of a desk, from slides to a CLIP."""
