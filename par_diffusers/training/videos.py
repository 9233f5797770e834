"""Video folders, and the clips of a video that training sees (paper, section 4.1: random clips of 17 frames)."""

import random
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from par_diffusers.cli import check_installed
from par_diffusers.training.images import IMAGE_SUFFIXES, NUM_VIEWS, VIDEO_SUFFIXES, MediaFolder, center_crop


def read_clip(file: str | Path, num_frames: int, frame_rate: float, place: float) -> list[Image.Image]:
    """
    Frames of a video, RGB.

    Args:
        file (`str` or `Path`): Any file that FFmpeg reads.
        num_frames (`int`): Frames of the clip. A video that is shorter holds its last frame.
        frame_rate (`float`): Frames a second, each the one that is shown at its time; 0 for every frame of the video.
        place (`float`): Where the clip begins, from 0 (with the video) to 1 (so that both end together).

    Raises:
        `ValueError` where the file cannot be read.
    """
    import av

    try:
        with av.open(str(file)) as container:
            if not container.streams.video:
                raise ValueError("it has no video stream.")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            packets = [_time(packet) for packet in container.demux(stream) if packet.size]
            times = sorted(time for time in packets if time is not None)
            if not times:
                raise ValueError("it has no frames.")
            if frame_rate:
                length = (num_frames - 1) / frame_rate
                start = times[0] + place * max(times[-1] - times[0] - length, 0.0)
                wanted = [start + number / frame_rate for number in range(num_frames)]
            else:
                first = round(place * max(len(times) - num_frames, 0))
                wanted = times[first : first + num_frames]
                wanted += wanted[-1:] * (num_frames - len(wanted))
            container.seek(int(wanted[0] / stream.time_base), stream=stream)
            return _frames_at(container.decode(stream), wanted)
    except av.FFmpegError as error:
        raise ValueError(str(error)) from None


def _time(packet_or_frame) -> float | None:
    """In seconds; old formats tell when a frame is decoded, not when it is shown."""
    time = packet_or_frame.pts if packet_or_frame.pts is not None else packet_or_frame.dts
    return None if time is None else float(time * packet_or_frame.time_base)


def _frames_at(frames, times: list[float]) -> list[Image.Image]:
    """Of `frames`, in order, the one that is shown at each of `times`, which do not decrease."""
    found, shown = [], None
    for frame in frames:
        # a frame is shown from its time to that of the next; containers round times, to a millisecond at worst
        while shown is not None and len(found) < len(times) and times[len(found)] < _time(frame) - 1e-3:
            found.append(shown)
        if len(found) == len(times):
            break
        shown = frame.to_image()
    if shown is None:
        raise ValueError("none of its frames can be decoded.")
    return found + [shown] * (len(times) - len(found))


class VideoFolder(MediaFolder):
    """
    A [`MediaFolder`] of videos. A view is a clip, uint8 (3, num_frames, image_size, image_size), centre-cropped: `num_clips`
    of each video at random places, then their mirror images with `augmentation="flip"`.

    Args:
        folder (`str` or `Path`), classes (`list[str]`, *optional*): See [`MediaFolder`].
        image_size (`int`): Pixels of a side.
        num_frames (`int`), frame_rate (`float`): Of a clip, see `read_clip`.
        num_clips (`int`, defaults to 1): Clips of each video.
        augmentation (`str`, defaults to `"none"`): `"none"` or `"flip"`.
        seed (`int`, defaults to 0): Where clips begin depends on this, the name of the file and the number of the clip alone.
    """

    kind, suffixes = "videos", VIDEO_SUFFIXES
    other, other_suffixes = "images", IMAGE_SUFFIXES

    def __init__(
        self,
        folder: str | Path,
        image_size: int,
        num_frames: int,
        frame_rate: float,
        num_clips: int = 1,
        augmentation: str = "none",
        seed: int = 0,
        classes: list[str] | None = None,
    ):
        check_installed("av", "video")
        if augmentation not in ("none", "flip"):
            raise ValueError(f"`augmentation` must be 'none' or 'flip' for videos, got {augmentation!r}.")
        self.image_size, self.num_frames, self.frame_rate = image_size, num_frames, frame_rate
        self.num_clips, self.augmentation, self.seed = num_clips, augmentation, seed
        super().__init__(folder, classes)

    @property
    def view(self) -> tuple:
        return (self.image_size, self.num_frames, self.frame_rate, self.num_clips, self.augmentation, self.seed)

    @property
    def num_views(self) -> int:
        return self.num_clips * NUM_VIEWS[self.augmentation]

    def load(self, index: int, view: int | None = None) -> torch.Tensor:
        """All views of a video, uint8 (views, 3, num_frames, image_size, image_size), or one of them."""
        if view is not None:
            clip = self._clip(index, view % self.num_clips)
            return clip.flip(-1) if view >= self.num_clips else clip
        clips = torch.stack([self._clip(index, number) for number in range(self.num_clips)])
        return torch.cat([clips, clips.flip(-1)]) if self.augmentation == "flip" else clips

    def _clip(self, index: int, number: int) -> torch.Tensor:
        place = random.Random(f"{self.seed}/{self.files[index]}/{number}").random()
        frames = read_clip(self.folder / self.files[index], self.num_frames, self.frame_rate, place)
        frames = np.stack([np.asarray(center_crop(frame, self.image_size)) for frame in frames])
        return torch.from_numpy(frames).permute(3, 0, 1, 2)


def write_clip(file: str | Path, frames: np.ndarray, frame_rate: float) -> None:
    """
    Writes frames, uint8 (frames, H, W, 3), as a video of the kind that the name ends in; `.mp4` gets lossless H.264, which is
    the same bytes each time (lossy, it is not).
    """
    import av

    with av.open(str(file), "w") as container:
        if Path(file).suffix == ".mp4":
            stream = container.add_stream("libx264", rate=round(frame_rate), options={"qp": "0"})
            stream.pix_fmt = "yuv444p"
        else:
            stream = container.add_stream(container.default_video_codec, rate=round(frame_rate))
            stream.pix_fmt = "yuv420p"
        stream.height, stream.width = frames.shape[1:3]
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
