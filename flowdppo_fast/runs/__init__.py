"""What a run leaves and reads back: logs, plots, pages of images, and what `flowdppo diagnose` makes of them."""
