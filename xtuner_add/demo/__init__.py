"""`xtuner-add demo`: the whole road from images to a model that answers, on data made here."""
