"""Generates through the C library, given as the argument, from Python: what tests/capi.rs compares with the engine in Rust."""

import ctypes
import sys
from ctypes import POINTER, byref, c_char_p, c_float, c_int32, c_size_t, c_uint32, c_uint64, c_void_p

lib = ctypes.CDLL(sys.argv[1])
lib.mindskip_error.restype = c_char_p


class Sized(ctypes.Structure):
    def __init__(self, **fields):
        super().__init__(size=ctypes.sizeof(self), **fields)


class Options(Sized):
    _fields_ = [("size", c_size_t)]
    _fields_ += [(name, c_char_p) for name in ["device", "dtype", "kv_dtype", "kernels", "precision", "memory"]]
    _fields_ += [(name, c_size_t) for name in ["threads", "context", "batch", "rows", "chunk"]]


class Routing(Sized):
    _fields_ = [("size", c_size_t)]
    _fields_ += [(name, c_char_p) for name in ["granularity", "keys", "select", "layers"]]
    _fields_ += [("threshold", c_float), ("capacity", c_float)]


class Turn(Sized):
    _fields_ = [("size", c_size_t), ("seq", c_uint64)]
    _fields_ += [("prompt", POINTER(c_uint32)), ("prompt_count", c_size_t)]
    _fields_ += [("history", POINTER(c_uint32)), ("history_count", c_size_t)]
    _fields_ += [("sampler", c_void_p), ("max_tokens", c_size_t)]
    _fields_ += [("eos", POINTER(c_uint32)), ("eos_count", c_size_t)]
    _fields_ += [("stop", POINTER(c_char_p)), ("stop_count", c_size_t)]


class Answer(Sized):
    _fields_ = [("size", c_size_t), ("text", c_char_p), ("text_length", c_size_t)]
    _fields_ += [("tokens", POINTER(c_uint32)), ("token_count", c_size_t), ("read", c_size_t), ("finish", c_int32)]


class Event(ctypes.Structure):
    _fields_ = [("size", c_size_t), ("request", c_uint64), ("kind", c_int32), ("status", c_int32)]
    _fields_ += [("text", c_char_p), ("text_length", c_size_t), ("answer", POINTER(Answer))]


TEXT, DONE, FAILED = range(3)
INTERRUPTED = 4

OnText = ctypes.CFUNCTYPE(c_int32, c_void_p, c_size_t, c_char_p, c_size_t)
OnEvent = ctypes.CFUNCTYPE(c_int32, c_void_p, POINTER(Event))


def call(name, *args):
    if getattr(lib, "mindskip_" + name)(*args):
        raise RuntimeError(lib.mindskip_error().decode())


def make(name, *args):
    handle = c_void_p()
    call(name, *args, byref(handle))
    return handle


try:
    make("model_load", b"/absent/folder")
    sys.exit("an absent model was loaded")
except RuntimeError as error:
    assert "is no folder" in str(error), error

model = make("model_load", b"stories")
routers = make("routers_load", model, None, byref(Routing(keys=b"active", layers=b"3,5-6", threshold=0.4)))
prompt = "Tom had a red ball."
ids, count = (c_uint32 * 64)(), c_size_t()
call("tokenize", model, prompt.encode(), 1, ids, 64, byref(count))
for title, how in [("routed", routers), ("dense", None)]:
    engine = make("engine_new", model, how, byref(Options(device=b"cpu", context=128)))
    seq, pieces = c_uint64(), []
    call("seq_open", engine, byref(seq))
    turn = Turn(seq=seq.value, prompt=ids, prompt_count=count.value, max_tokens=24)
    hear = OnText(lambda _user, _turn, text, _length: pieces.append(text) or 0)
    call("generate", engine, byref(turn), c_size_t(1), hear, None, None)
    print(f"{title}: {prompt}|{b''.join(pieces).decode()}")
    call("engine_free", engine)

# Five requests in two slots: each has the text that it has alone, but for the one that is cancelled after three steps.
turns = []
for number, text in enumerate([b"The dog", prompt.encode(), b"Once upon a time", b"Lily", b"One day"]):
    own, length = (c_uint32 * 64)(), c_size_t()
    call("tokenize", model, text, 1, own, 64, byref(length))
    turns.append(Turn(prompt=own, prompt_count=length.value, max_tokens=10 + 5 * number))
alone = []
for turn in turns:
    engine, answer = make("engine_new", model, routers, byref(Options(device=b"cpu", context=128))), Answer()
    lone = Turn.from_buffer_copy(turn)
    call("seq_open", engine, byref(lone, Turn.seq.offset))
    call("generate", engine, byref(lone), c_size_t(1), None, None, byref(answer))
    alone.append(answer.text)
    call("engine_free", engine)

batch = c_void_p()
engine = make("engine_new", model, routers, byref(Options(device=b"cpu", context=128, batch=2)))
call("batch_new", engine, c_size_t(0), byref(batch))
numbers, left, ends, served = [c_uint64() for _ in turns], c_size_t(1), {}, {}
for turn, number in zip(turns, numbers):
    call("batch_submit", batch, byref(turn), byref(number))


def hear_event(_user, event):
    event = event.contents
    if event.kind == TEXT:
        served[event.request] = served.get(event.request, b"") + event.text
    else:
        assert event.kind == DONE and event.answer.contents.text == served[event.request], event.text
        ends[event.request] = event.answer.contents.finish
    return 0


on_event, steps = OnEvent(hear_event), 0
while left.value:
    call("batch_step", batch, on_event, None, byref(left))
    steps += 1
    if steps == 3:
        call("batch_cancel", batch, numbers[1])
texts = [served[number.value] for number in numbers]
assert ends[numbers[1].value] == INTERRUPTED and alone[1].startswith(texts[1]) and len(texts[1]) < len(alone[1])
assert texts[:1] + texts[2:] == alone[:1] + alone[2:], (texts, alone)
call("batch_free", batch)
call("routers_free", routers)
call("model_free", model)
