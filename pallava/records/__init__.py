"""Records of published datasets: questions, their images and their classes, read row by row."""
