"""Audio: a recording becomes frames, or patches of its spectrogram, as they are heard."""
