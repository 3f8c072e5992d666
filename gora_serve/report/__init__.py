"""The page that `report` writes: runs read from disk, figures drawn as SVG, one HTML file that needs nothing else."""
