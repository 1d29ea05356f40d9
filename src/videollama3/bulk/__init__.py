"""Questions about many images and videos: read ahead, answered in batches, resumed where a run was killed."""
