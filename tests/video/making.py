"""Write small videos in many formats with the ffmpeg of imageio-ffmpeg."""

import subprocess

import imageio_ffmpeg

COLOUR = (64, 160, 192)
# Exact conversion, so that read values differ only by the rounding of the reader.
FLAT = (
    "color=c=0x40A0C0:s=32x16:r=10:d=0.5,format=gbrp,scale=out_color_matrix=bt709:flags=accurate_rnd+full_chroma_int"
)
# With noise, because some encoders drop a frame that equals the one before.
MOVING = "testsrc2=s=32x32:r=10:d=2,noise=alls=20:allf=t:all_seed=1"


def ffmpeg(*arguments):
    """Run ffmpeg with the arguments of the output last."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-nostdin", "-v", "error", "-y", *map(str, arguments)]
    subprocess.run(command, check=True, capture_output=True)


def make(path, *coding, source=MOVING):
    """Write a generated source as a video and return its path."""
    ffmpeg("-f", "lavfi", "-i", source, *coding, path)
    return path


def colour(clip, row=4, column=4):
    """Return a pixel of the first frame as bytes."""
    return tuple(round(float(value) * 255) for value in clip[0, :, row, column])
