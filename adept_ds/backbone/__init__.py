"""The frozen language model: where it is, how it is loaded, split over ranks and held in few bits."""
