"""Reading and writing of video. No other package of postgen opens a video or picture file.

A clip is a float32 tensor (F, 3, H, W) in [0, 1]. Reading and writing both stream, so a long video never has to fit
into memory as a whole.
"""

from postgen.video.compose import contact_sheet, side_by_side
from postgen.video.ffmpeg import NoFFmpegError, VideoError
from postgen.video.footage import Footage, TooLongError
from postgen.video.growing import GROWING, GrowingVideo, check_mark, copy_video
from postgen.video.read import PICTURES, VIDEOS, VideoInfo, iter_video, probe, read_comment, read_video
from postgen.video.stills import check_picture, read_picture, rgb_picture
from postgen.video.write import FORMATS, check_target, checked_rate, holds_comment, write_video

__all__ = [
    "FORMATS",
    "GROWING",
    "PICTURES",
    "VIDEOS",
    "Footage",
    "GrowingVideo",
    "NoFFmpegError",
    "TooLongError",
    "VideoError",
    "VideoInfo",
    "check_mark",
    "check_picture",
    "check_target",
    "checked_rate",
    "contact_sheet",
    "copy_video",
    "holds_comment",
    "iter_video",
    "probe",
    "read_comment",
    "read_picture",
    "read_video",
    "rgb_picture",
    "side_by_side",
    "write_video",
]
