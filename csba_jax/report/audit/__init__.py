"""What was found in a folder of photos: lines for a terminal, and a page with thumbnails."""
