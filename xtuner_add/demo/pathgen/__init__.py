"""`xtuner-add demo-pathgen`: PathGen-1.6M in miniature, from slides to a CLIP."""
