"""One pass over a video file by PyAV or torchcodec: frames in presentation order, from a source that is sorted out.

Unusual here: where the next wanted instant lies beyond a key frame the pass jumps there, and frames that nothing refers
to and nobody sees are not decoded; what comes out is the same as without these two. Local files are opened through a
descriptor and every other protocol is refused, so a playlist cannot reach the network or other files. Damaged packets
are counted and passed over.
"""

import io
import math
import os
import struct
from contextlib import closing, contextmanager
from itertools import chain
from pathlib import Path

import av
from av.error import ExitError, FFmpegError
from av.video.reformatter import VideoReformatter

from vamba.errors import VideoReadError
from vamba.modeling.media_limits import MAX_AREA, MEMORY_VARIABLE, media_memory

from .pictures import PNG_MARK, REFERENCES, ArrayClip, VideoInfo, check_decoding, few_at_once, to_rgb
from .pyav_versions import frame_duration, is_cover_art, key_frame_index, quarter_turns
from .selection import MAX_GAP, PresentationClock


MAX_READ_FAILURES = 32  # reads of the container that may fail before the file counts as ended
MIN_SKIP = 2.0  # seconds: nearer instants are reached by decoding
MIN_GAIN = 1.0  # seconds of decoding that a jump must save, where an index tells
URL_PROTOCOLS = "http,https,httpproxy,tcp,tls,crypto,ftp,rtmp,rtmps,rtmpt,rtp,rtsp,srtp,udp,data"
URL_TIMEOUT = 30.0
NO_SIZE = (
    "its pictures have no size that may be decoded: damaged, or too large; scale the video down or raise "
    f"{MEMORY_VARIABLE}"
)
ANIMATED_WEBP = "FFmpeg reads no animated WebP; convert it, for example to MP4, or give its pictures one by one"
# Decoders that unpack what stands beside the picture. Only this module calls them, after a look at what they get, and
# not FFmpeg when it looks into a file that is opened.
UNPACKING, MOST_PACKED = ("png", "apng"), 2**17  # bytes, which may become a thousand times as many
_CODECS = ",".join(sorted(av.codecs_available - {*UNPACKING}))
NO_FRAMES = "not one frame of the video stream could be decoded; the file is damaged"


class PyavClip:
    """A video decoded by PyAV (FFmpeg)."""

    def __init__(self, name, source, threads):
        self.name, self.source, self.threads = name, source, threads
        self.info = None
        with closing(PyavStream(self, threads=1)) as probe:
            if next(probe.pictures(), None) is None:
                raise VideoReadError(NO_FRAMES)
            self.info = probe.info
            self.origin = probe.origin

    def open(self):
        return PyavStream(self, self.threads)

    def last_time(self):
        """When the last frame starts: from the packets at the declared end, or from all if those tell nothing."""
        for from_end in (True, False):
            with closing(PyavStream(self, threads=1)) as stream:
                last = stream.scan_packets(from_end)
            if last is not None:
                return last
        return 0.0


def _open_container(source):
    """The opened container; of all protocols only the one that carries `source` itself is allowed."""
    descriptor, timeout, options = None, None, {"protocol_whitelist": "none"}
    try:
        if isinstance(source, Path):
            descriptor = os.open(source, os.O_RDONLY | getattr(os, "O_BINARY", 0))
            source, options = "fd:", {"fd": str(descriptor), "protocol_whitelist": "fd"}
        elif isinstance(source, str):
            timeout, options = URL_TIMEOUT, {"protocol_whitelist": URL_PROTOCOLS}
        elif isinstance(source, bytes):
            source = io.BytesIO(source)
        else:
            source.seek(0)
        options |= _bounds() | {"codec_whitelist": _CODECS}
        return av.open(source, options=options, metadata_errors="replace", timeout=timeout)
    except (OSError, ValueError, FFmpegError) as error:
        reason = getattr(error, "strerror", None) or error
        if isinstance(error, ExitError):
            reason = f"no answer in {URL_TIMEOUT:g} seconds"
        raise VideoReadError(
            f"cannot be opened as a video ({reason}); check that it is a complete video file"
        ) from error
    finally:
        if descriptor is not None:
            os.close(descriptor)


class PyavStream:
    """One pass over a video's frames, in presentation order, with jumps over what nobody asked for."""

    def __init__(self, clip, threads):
        self._clip, self._threads = clip, threads
        self.lost = self.packets = self.damaged = 0
        self.origin = self.end_time = self.info = None
        self._ended = False
        # the frame given last; the instant asked for; the newest frame that may be on screen at that instant
        self._position = self._target = self._newest = -math.inf
        # a jump: that is wanted, is under way, was considered last; frames up to here were given before it
        self._wanted = self._landing = self._tried = None
        self._replayed, self._retreats, self._min_skip = -math.inf, 0, MIN_SKIP
        self._reformatter = VideoReformatter()
        self._open()

    def _open(self):
        self.container = _open_container(self._clip.source)
        try:
            self.stream = _video_stream(self.container)
            context = self.stream.codec_context
            if context is None:
                raise VideoReadError("no decoder for its video codec; convert it, for example to H.264")
            if not (context.width and context.height):  # so FFmpeg leaves it where it refused the size
                webp = "webp" in self.container.format.name
                raise VideoReadError(ANIMATED_WEBP if webp else NO_SIZE)
            picture = check_decoding(context.width, context.height, context.format)
            if _is_packed_bomb(context.name, context.extradata or b""):
                raise VideoReadError(f"it holds more than {MOST_PACKED} bytes of packed metadata; remove them")
            context.thread_type = "AUTO"
            context.thread_count = _threads(self._threads, picture)
            context.options = _bounds()
            self.time_base = float(self.stream.time_base or 0) or 1e-6
            rates = self.stream.average_rate, self.stream.guessed_rate, self.stream.base_rate
            self.rate = next((float(rate) for rate in rates if rate and 0 < rate <= 1000), None)
            self.duration = _declared_duration(self.stream, self.container)
        except BaseException:
            self.container.close()
            raise
        interval = 1 / (self.rate or 25.0)
        # Containers round times to their time base (mkv: 1 ms), so a frame may carry a time just after its instant.
        self.tolerance = min(0.5 * self.time_base, 0.1 * interval) + 1e-6
        self._clock = PresentationClock(interval, self.duration)
        self._seekable = self.container.format.name.startswith(("mov,mp4", "matroska"))

    def close(self):
        self.container.close()

    def pictures(self):
        """(time, picture) of every frame in order; after `skip_to(t)` the frames well before t may be missing."""
        decoded = self._decoded()
        while True:
            frame = next(decoded, None)
            if frame is None and self._landing is None:
                self._ended = True
                return
            time = None if frame is None else self._clock.tick(self._raw_time(frame))
            if self._landing is not None:
                if frame is not None and not frame.key_frame:
                    continue
                if frame is None or frame.pts is None or time > self._landing + self.tolerance:
                    self._seek_earlier()
                    decoded = self._decoded()
                    continue
                if time <= self._position:  # nothing gained: ask again only for something much further off
                    self._min_skip = 2 * (self._landing - self._position)
                self._landing = None
            if time <= self._replayed:
                continue
            self._position, self.end_time = time, time + self._frame_duration(frame)
            self.info = self.info or self._describe_first(frame)
            yield time, frame
            if self._wanted is not None:
                self._landing, self._wanted = self._wanted, None
                self._replayed, self._retreats = self._position, 0
                self._seek(self._landing)
                decoded = self._decoded()

    def skip_to(self, target):
        """Frames before the last one shown at `target` (seconds) are of no interest; jump there if that pays."""
        self._target = target
        if not (self._seekable and self._clock.trusted) or target == self._tried:
            return
        if target - self._position < self._min_skip:
            return
        self._tried = target
        index = key_frame_index(self.stream)
        stamp = self.origin + round(target / self.time_base)
        if index is not None and index[len(index) - 1].timestamp >= stamp:
            key = index.search_timestamp(stamp, backward=True)
            if key < 0 or (index[key].timestamp - self.origin) * self.time_base - self._position < MIN_GAIN:
                return
        self._wanted = target

    def _seek(self, time):
        self._clock.jump()
        self._newest = -math.inf
        try:
            self.container.seek(self.origin + round(time / self.time_base), stream=self.stream)
        except (FFmpegError, OverflowError):
            self._start_over()

    def _seek_earlier(self):
        """The jump came out too late (a wrong index, an open GOP): aim further back, in the end at the beginning."""
        self._retreats += 1
        aim = self._landing - 2.0 * 4.0**self._retreats
        if aim <= self._position or self._retreats > 4:
            self._start_over()
        else:
            self._seek(aim)

    def _start_over(self):
        self.container.close()
        self._open()
        self._landing, self._seekable, self._newest = None, False, -math.inf

    def _decoded(self):
        """Frames from the container's present position; packets that fail are counted and passed over."""
        for packet in chain(self._packets(), [None]):
            yield from self._decode(packet)

    def _packets(self):
        for _ in range(MAX_READ_FAILURES):
            try:
                yield from self.container.demux(self.stream)
                return
            except FFmpegError:
                self.lost += 1
            except IndexError:  # PyAV at the end of a file in which streams appeared on the way
                return

    def _decode(self, packet):
        self.packets += packet is not None and packet.size > 0
        try:
            if packet is None:
                return self.stream.codec_context.decode(None)
            if _is_packed_bomb(self.stream.codec_context.name, packet):
                self.lost += 1
                return []
            self._spare(packet)
            return packet.decode()
        except FFmpegError:
            self.lost += packet is not None
            return []

    def _spare(self, packet):
        """Have the decoder drop the packet's frame if no other refers to it and a later one hides it at the target."""
        drop = False
        if packet.pts is not None and self.origin is not None and self._clock.trusted:
            time = (packet.pts - self.origin) * self.time_base
            drop = time < self._newest
            if time - self.tolerance <= self._target:
                self._newest = max(self._newest, time)
        self.stream.codec_context.skip_frame = "NONREF" if drop else "DEFAULT"

    def _raw_time(self, frame):
        if frame.pts is None:
            return None
        if self.origin is None:
            before = 0.0 if self._clock.last is None else self._clock.last + self._clock.interval
            self.origin = frame.pts - round(before / self.time_base)
        return (frame.pts - self.origin) * self.time_base

    def _frame_duration(self, frame):
        duration = frame_duration(frame) * self.time_base
        return duration if 0 < duration <= MAX_GAP else self._clock.interval

    def _describe_first(self, frame):
        turns = quarter_turns(frame)
        size = (frame.width, frame.height) if turns % 2 == 0 else (frame.height, frame.width)
        codec, count = self.stream.codec_context.name, self.stream.frames or None
        return VideoInfo(self._clip.name, self.duration, self.rate, *size, codec, turns * 90, count)

    def scan_packets(self, from_end):
        """Time of the last frame in seconds by demultiplexing only; None when there is no packet with a time."""
        origin = self._clip.origin
        if from_end:
            if self.duration is None or origin is None or not self._seekable:
                return None
            try:
                self.container.seek(origin + round(self.duration / self.time_base), stream=self.stream)
            except (FFmpegError, OverflowError):
                return None
        last, count, limit = None, 0, max(self.duration or 0.0, 0.0) + MAX_GAP
        for packet in self._packets():
            stamp = packet.dts if packet.pts is None else packet.pts
            count += packet.size > 0
            time = None if stamp is None or origin is None else (stamp - origin) * self.time_base
            if time is not None and 0 <= time <= max(limit, (last or 0.0) + MAX_GAP):
                last = time if last is None else max(last, time)
        return (count - 1) * self._clock.interval if last is None and count and not from_end else last

    def missing_from_end(self):
        """Seconds between the end of the last frame and the declared end; 0 when that is no sign of damage."""
        if not self._ended or self.duration is None or len(self.container.streams) > 1:
            return 0.0
        missing = self.duration - self.end_time
        return missing if missing > max(1.0, 0.05 * self.duration, 3 * self._clock.interval) else 0.0

    def render(self, frame, height, width):
        """`frame` upright as uint8 RGB (3, height, width), or None when it cannot be converted."""
        check_decoding(frame.width, frame.height, frame.format)
        self.damaged += frame.is_corrupt
        try:
            return to_rgb(self._reformatter, frame, height, width, self._threads)
        except (FFmpegError, ValueError):
            self.lost += 1
            return None


def _is_packed_bomb(codec, data):
    """Whether a PNG brings more packed metadata than any needs, which FFmpeg would unpack whatever it takes."""
    if codec not in UNPACKING:
        return False
    data, packed = bytes(data), 0
    place = len(PNG_MARK) if data.startswith(PNG_MARK) else 0
    while place + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, place)
        packed += length if kind in (b"iCCP", b"zTXt", b"iTXt") else 0
        place += 12 + length
    return packed > MOST_PACKED


def _bounds():
    """FFmpeg's own bound on pictures, which holds before anything else, when it looks into a file that is opened."""
    return {"max_pixels": str(min(MAX_AREA, media_memory() // 16))}


def _threads(asked, picture):
    """As many threads as are asked for (0 = as FFmpeg thinks right), fewer where each holds large pictures."""
    usual = asked or min((os.cpu_count() or 1) + 1, 16)
    fitting = max((few_at_once(picture) - REFERENCES) // 2, 1)
    return fitting if fitting < usual else asked


def _video_stream(container):
    """The video stream that a player would show; cover art does not count."""
    streams = [s for s in container.streams.video if not is_cover_art(s)]
    best = container.streams.best("video")
    if best is not None and any(best.index == stream.index for stream in streams):
        return best
    if streams:
        return streams[0]
    # not by each stream's type, of which PyAV before 17 makes a segmentation fault where it is unknown
    kinds = [kind for kind in ("audio", "data", "subtitles") if getattr(container.streams, kind)]
    found = f"only {' and '.join(kinds)}" if kinds else "nothing"
    raise VideoReadError(f"has no video stream ({found}); give a file with moving pictures")


def _declared_duration(stream, container):
    """Seconds from the first frame to the end as the headers have it, or None."""
    if stream.duration and stream.time_base and stream.duration > 0:
        return float(stream.duration * stream.time_base)
    duration = container.duration or 0
    if container.format.name.startswith("matroska"):  # counts from zero, not from the first frame
        duration -= max(container.start_time or 0, 0)
    return duration / 1e6 if duration > 0 else None


class TorchcodecClip(ArrayClip):
    """A video decoded by torchcodec. Local files go in as file objects, so nothing else is opened."""

    def __init__(self, name, source, threads):
        try:
            from torchcodec.decoders import VideoDecoder
        except (ImportError, RuntimeError, OSError) as error:
            raise VideoReadError(
                "backend='torchcodec' is not available; pip install torchcodec (it needs FFmpeg's shared libraries), "
                "or use backend='pyav'"
            ) from error
        self._source, self._decoder_type, self._threads = source, VideoDecoder, threads
        self._file = self._wanted = None
        with self._errors():
            metadata = self._new_decoder().metadata
        self._begin = metadata.begin_stream_seconds or 0.0
        span, size = metadata.end_stream_seconds - self._begin, (metadata.width, metadata.height)
        check_decoding(*size, None)
        self.info = VideoInfo(name, span, metadata.average_fps, *size, metadata.codec, 0, metadata.num_frames)
        self.close()

    @contextmanager
    def _errors(self):
        try:
            yield
        except (RuntimeError, ValueError, IndexError, OSError) as error:
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise VideoReadError(f"torchcodec cannot read it ({reason[0]})") from error

    def _new_decoder(self):
        self._file = open(self._source, "rb") if isinstance(self._source, Path) else None
        source = self._file or self._source
        return self._decoder_type(source, num_ffmpeg_threads=self._threads, seek_mode="exact")

    def last_time(self):
        return max(self.info.duration - 1 / (self.info.fps or 25.0), 0.0)

    def pictures(self):
        decoder, time, last = self._new_decoder(), 0.0, -1.0
        while time < self.info.duration - self.tolerance:
            with self._errors():
                frame = decoder.get_frame_played_at(self._begin + time)
            shown, length = frame.pts_seconds - self._begin, max(frame.duration_seconds, 1e-3)
            self.end_time = shown + length
            if shown > last:
                last = shown
                yield shown, frame.data
            time = max(shown, time) + length if self._wanted is None else max(self._wanted, shown + length)
            time, self._wanted = min(time + self.tolerance, self.info.duration), None

    def skip_to(self, target):
        self._wanted = target if math.isfinite(target) else None

    def array(self, picture):
        return picture.permute(1, 2, 0).numpy()

    def close(self):
        if self._file is not None:
            self._file.close()
