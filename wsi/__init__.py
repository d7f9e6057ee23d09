"""From slides to patches: reading, tissue, tiling, extraction. Knows no torch and no MM library."""
