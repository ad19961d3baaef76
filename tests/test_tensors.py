"""Weights of every format and dtype come back as they were; what is damaged, foreign or hostile is one line, and nothing of it runs."""

import base64
import hashlib
import lzma
import os
import pickle
import random
import struct
import tracemalloc
import zipfile

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from vitmed import config
from vitmed.models import tensors

# torch.save of torch 2.13: {"model": a LayerNorm's state_dict (an OrderedDict with _metadata) with more tensors, "epoch": 3, "args":
# argparse.Namespace(lr, device, dtype, size)}; LZMA, base85.
REAL = (
    "T>t=p0RR90|NsC0{{ScwykIBi4U4E!H4|H|eL=amvoJFluElrdIJTjQ+T>oEh{*l8B{cx~H|;B?WZ9TOis(s;D_}ABWDva=+CdrWZNOGEUP0)7;?{9{-pJuSsXeylcX{CEUIL-"
    "FvA-S<)dN?w=_*ip^$(xDmsjcgN=se79JM-uGPCMl{Pxnxy{%>2@ztyvFW*Lvi1$3^<lv%kVJ9Mk!q@M99CMNrR^rUmDsMq{=2}jNQt&_3&3nE_$6JTwvp%-P*|2i)hBF!GWZf"
    "8VsS>pgY%Hs@azQznMi@o_r`yE;JyFw-L@+mxmMR(PIKeHF@uG=w3tlih!|jcvaWr-aslBJwtsBQe<X0ohLHI!Z9U>dUJYoR=Ww2|co;bI1UvO4(G}dEe5uXd7CM7^*ms;MBs0"
    "&8RG$ZC(q}Sy%WGgU%;Bh`+oUEAT&zhgfnnf4aF%P!F<py-)>GB^adIyg+j1A~7%Es1-I}s9&vJS?RlQU$i(J&iL>0}x?_6HVmP#S}dq~!1kJ=K_*8)LL`E?x~@laf^H_}f2f+"
    "wZeMA{)Ks&w3efPy_-3KXMkPGjNI1K6+dc1K66P$68^1#VJR=cJxqa^}#sz%|Vs@sxBhD_|?gkp0vO)GGi&8{VdGO1iB#1*j50QiFnCQ{ke4KIX{#OQTjOXhh?9{gs=fP_x;0S"
    "D7znw`D`^jPCwfd$F14A3D3&PVbJ}ZWr*<HifqvuR_}aFqP*cqwAb@fHmslNW>Bkcvx5tSIUO29nwxmxo9#8CKu|#|g_XCa!czOqplAEzgY(wII0g&O?(*=2b4Se^74UW+6H5v"
    "JNNQ*uE##tDtQ<_K_l*{qL=%4|-bl-3-gqfrwVtu!;TJTEZxbVM&@h$mR$NCECDyx*#cDqg`sQ6mjT1gscT3HT<lW$Ws)udJJbNXXZP&+sKTyjZ3mx76R4Cr9Pb=8#+;2i|NoI"
    "USkGFS0D^sQ{o<V1P&}<~NxMd#x#d25Zg^i#jUC1vc2|wa;YzGV8*cl=FIALcdCN^m%MKWhQ-0z;6Jw}1w0Ek=RlX7^{&YM2zdPI2SDnSGWCZd1PCz4|YJiI_%T+=g0C8MPJeA"
    "2o#rpyAAlJmXFd^8oC$f1YA+GdieiERK{Anxm42?1RKPZXW%I$)r+a;nkf&){3ZjeNw`J>z+)j=F>;Qiv<Q#I*b$_R*hh<}o@4zd}6E&7adBIGvj$)eLlPmcKFeXpqoz!;`&C5"
    "+Zf=##@QK^-SY8bH~&qA&u_2wwWoA=7UtnOL8`8nZ`X^^EZwN5tiF1r(~mP8u7wUf1kWL%z~&a#Ip7qmS<R_Am@s;zraep_g`Bqdk50axjNj;KOmGCV*azr=>_EtWPDX>Okddn"
    "02+>7Rt=Xw8|e)@CGPnqZa=GhW`db?XS4R;ub@`>>l4iY`#9nM21&~##~Qz5jj$Qj5SML{+Jw|Y^-p#znFSXPjrbebAM?xseQ~0-?Lcy|yHqVA)>S5du<tbg^$l#e"
)
STORAGES = {"<f4": "Float", "<f8": "Double", "<f2": "Half", "bfloat16": "BFloat16", "<i8": "Long", "|u1": "Byte", "|b1": "Bool"}
VALUES = np.arange(24).reshape(4, 6) / 4  # exact in every dtype


def opcodes(value):
    """A value as torch pickles it; of tuples that start with a word in capitals: GLOBAL module name, REDUCE, BUILD, PERSID, RAW bytes."""
    match value:
        case ("GLOBAL", module, name):
            return f"c{module}\n{name}\n".encode()
        case ("REDUCE", function, arguments):
            return opcodes(function) + opcodes(arguments) + b"R"
        case ("BUILD", instance, state):
            return opcodes(instance) + opcodes(state) + b"b"
        case ("PERSID", identity):
            return opcodes(identity) + b"Q"
        case ("RAW", written):
            return written
        case dict():
            return b"}(" + b"".join(opcodes(key) + opcodes(each) for key, each in value.items()) + b"u"
        case list() | tuple():
            before, after = (b"](", b"e") if isinstance(value, list) else (b"(", b"t")
            return before + b"".join(map(opcodes, value)) + after
        case _:
            return pickle.dumps(value, 2)[2:-1]  # without PROTO and STOP


REBUILD = "_rebuild_tensor_v2"
ORDERED = ("REDUCE", ("GLOBAL", "collections", "OrderedDict"), ())


def storage(key, array):
    name = STORAGES.get(array.dtype.str, STORAGES.get(array.dtype.name))
    return ("PERSID", ("storage", ("GLOBAL", "torch", f"{name}Storage"), key, "cuda:0", array.size))


def view(source, offset, shape, strides):
    return ("REDUCE", ("GLOBAL", "torch._utils", REBUILD), (source, offset, shape, strides, False, ORDERED))


def whole(key, array):
    return view(storage(key, array), 0, array.shape, tuple(step // array.itemsize for step in array.strides))


def torch_zip(path, root, arrays, *, members=None, compression=zipfile.ZIP_STORED):
    """Write a PyTorch file: `root` is a value for `opcodes`, or a pickle; `arrays` go to data/<key>; further members by name."""
    pickled = root if isinstance(root, bytes) else b"\x80\x02" + opcodes(root) + b"."
    parts = {"data.pkl": pickled, "byteorder": b"little", **{f"data/{key}": array.tobytes() for key, array in arrays.items()}}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in (parts | (members or {})).items():
            archive.writestr(f"w/{name}", content)
    return path


def read_all(path):
    with tensors.opened(path) as file:
        return {name: tensor.read() for name, tensor in file.tensors.items()}


def refusal(path, *, read=False):
    """The line that opening the file, or reading its tensors, is refused with."""
    with pytest.raises(config.InputError) as caught:
        read_all(path) if read else tensors.opened(path).__enter__()
    message = str(caught.value)
    assert message.startswith(str(path))
    assert "; " in message, "no advice"
    assert "\n" not in message
    return message


def write(path, arrays):
    """Write the arrays in the format of the path's suffix."""
    if path.suffix == ".safetensors":
        safetensors.numpy.save_file(arrays, path, {"note": "n"})
    elif path.suffix == ".npz":
        np.savez(path, **arrays)
    else:
        torch_zip(path, {name: whole(name, array) for name, array in arrays.items()}, arrays)
    return path


SUFFIXES = pytest.mark.parametrize("suffix", [".safetensors", ".npz", ".pth"])


@SUFFIXES
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, ml_dtypes.bfloat16])
def test_every_format_and_dtype_comes_back_as_float32(suffix, dtype, tmp_path):
    arrays = {"Transformer/block_0/kernel": VALUES.astype(dtype), "blocks.0.bias": VALUES[0].astype(dtype), "scale": np.array(2.5, dtype)}
    arrays["none"] = np.zeros((0, 3), dtype)
    with tensors.opened(str(write(tmp_path / f"w{suffix}", arrays))) as file:
        assert file.metadata == ({"note": "n"} if suffix == ".safetensors" else {})
        assert {name: tensor.shape for name, tensor in file.tensors.items()} == {name: array.shape for name, array in arrays.items()}
        for name, array in arrays.items():
            values = file.tensors[name].read()
            assert values.flags.c_contiguous
            np.testing.assert_array_equal(values, array.astype(np.float32), strict=True)
            values += 1  # in memory of its own: the next reading is as the first
            np.testing.assert_array_equal(file.tensors[name].read(), array.astype(np.float32))


@SUFFIXES
def test_integers_are_listed_but_not_read(suffix, tmp_path):
    path = write(tmp_path / f"w{suffix}", {"weight": VALUES.astype(np.float32), "index": np.arange(3), "mask": np.array([True, False])})
    with tensors.opened(path.rename(tmp_path / "checkpoint.bin")) as file:  # its content says what it is, not its name
        assert file.tensors["index"].shape == (3,)
        for name in ("index", "mask"):
            with pytest.raises(config.InputError, match=f"bin: tensor '{name}' holds .*float32"):
                file.tensors[name].read()
        assert file.tensors["weight"].read().sum() == VALUES.sum()


@SUFFIXES
def test_float64_beyond_float32_is_refused_and_a_closed_file_says_so(suffix, tmp_path):
    path = write(tmp_path / f"w{suffix}", {"a": np.array([1e300])})
    assert "'a'" in refusal(path, read=True)
    with tensors.opened(path) as file:
        pass
    with pytest.raises(RuntimeError, match="within the context"):
        file.tensors["a"].read()


@SUFFIXES
def test_a_file_that_shrinks_while_it_is_open(suffix, tmp_path):
    with tensors.opened(write(tmp_path / f"w{suffix}", {"a": np.ones(99_999, np.float32)})) as file:
        os.truncate(file.path, 9999)
        with pytest.raises(config.InputError, match="'a'"):
            file.tensors["a"].read()


def test_npz_of_other_orders_and_packing(tmp_path):
    np.savez_compressed(tmp_path / "w.npz", f=np.asfortranarray(VALUES), b=VALUES.astype(">f4"), c=VALUES.astype(np.float32))
    for values in read_all(tmp_path / "w.npz").values():
        np.testing.assert_array_equal(values, VALUES.astype(np.float32), strict=True)


@pytest.mark.parametrize("header", ["{[]: 1}", "-" * 9000 + "1", "{'descr': '<f4', 'fortran_order': False, 'shape': (-4, -6)}"])
def test_npz_headers_that_numpy_does_not_write(header, tmp_path):
    with zipfile.ZipFile(tmp_path / "w.npz", "w") as archive:
        archive.writestr("a.npy", b"\x93NUMPY\1\0" + struct.pack("<H", len(header) + 1) + header.encode() + b"\n" + bytes(96))
    refusal(tmp_path / "w.npz")


def test_what_torch_itself_saved(tmp_path):
    (tmp_path / "w.pth").write_bytes(lzma.decompress(base64.b85decode(REAL)))
    base, expected = np.arange(24, dtype=np.float32).reshape(4, 6), {"weight": np.ones(3), "bias": np.zeros(3), "parameter": np.array(2.5)}
    expected |= {"turned": base.T, "half": base[1:3, 2:5], "part": base[1:3, 2:5], "brain": [1.5, -2, float(ml_dtypes.bfloat16(3e38))]}
    with tensors.opened(tmp_path / "w.pth") as file:
        assert file.tensors.keys() == expected.keys() | {"count"}
        for name, values in expected.items():
            np.testing.assert_array_equal(file.tensors[name].read(), np.asarray(values, np.float32), strict=True)


def test_views_of_one_storage_are_read_alone(tmp_path):
    flat = np.arange(4_000_000, dtype=np.float32)
    views = {"first": (0, (2, 3), (3, 1)), "turned": (8, (2, 3), (1, 2)), "every other": (1, (5,), (2,)), "last": (3_999_999, (), ())}
    path = torch_zip(tmp_path / "w.pt", {name: view(storage("0", flat), *where) for name, where in views.items()}, {"0": flat})
    tracemalloc.start()
    found = read_all(path)
    assert tracemalloc.get_traced_memory()[1] < 8e6, "far more than the few values asked for was in memory"
    tracemalloc.stop()
    expected = [[[0, 1, 2], [3, 4, 5]], [[8, 10, 12], [9, 11, 13]], [1, 3, 5, 7, 9], 3_999_999]
    assert {name: values.tolist() for name, values in found.items()} == dict(zip(views, expected, strict=True))


@pytest.mark.parametrize(
    ("wrap", "found"),
    [
        (lambda weights, other: {"model": weights, "optimizer": {"state": other}, "epoch": 3, "lr": 0.1, "best": None}, "right"),
        (lambda weights, other: {"epoch": 3, 5: other, "state_dict": {"model": weights}}, "right"),
        (lambda weights, other: {"student": other, "teacher": weights, "loss": other["wrong"]}, "right"),
        (lambda weights, other: ("BUILD", weights, {"_metadata": ORDERED}), "right"),
        (lambda weights, other: {"encoder": weights}, None),
        (lambda weights, other: {"model": {"model": {"model": weights}}}, None),
        (lambda weights, other: weights["right"], None),
    ],
)
def test_the_state_dict_is_found_in_its_wrapping(wrap, found, tmp_path):
    path = torch_zip(tmp_path / "w.pth", wrap({"right": whole("0", VALUES)}, {"wrong": whole("0", VALUES)}), {"0": VALUES})
    if found:
        assert list(read_all(path)) == [found]
    else:
        assert "safetensors.torch.save_file" in refusal(path)


class Evil:
    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call[0], self.call[1:]


def hostile(sentinel):
    """Pickles that try to run `touch sentinel`: what the refusal names, and the pickle."""
    command, code = f"touch {sentinel}", f"open({str(sentinel)!r}, 'w').close()"
    run, order, tensor = (("GLOBAL", *name) for name in (("os", "system"), ("collections", "OrderedDict"), ("torch._utils", REBUILD)))
    yield "posix.system", pickle.dumps({"a": Evil(os.system, command)}, 4)
    yield "builtins.eval", pickle.dumps({"a": Evil(eval, code)}, 4)
    yield "__builtin__.eval", pickle.dumps({"a": Evil(eval, code)}, 2)
    for says, value in (
        ("os.system", ("REDUCE", run, (command,))),
        ("os.system", ("RAW", opcodes("os") + opcodes("system") + b"\x93(" + opcodes(command) + b"tR")),
        ("collections.os.system", ("RAW", opcodes("collections") + opcodes("os.system") + b"\x93")),
        (f"{REBUILD}.__globals__", ("RAW", opcodes("torch._utils") + opcodes(f"{REBUILD}.__globals__") + b"\x93")),
        ("builtins.getattr", ("REDUCE", ("GLOBAL", "builtins", "getattr"), (order, "__class__"))),
        ("INST", ("RAW", b"(" + opcodes(command) + b"ios\nsystem\n")),
        ("OBJ", ("RAW", b"(" + opcodes(order) + opcodes(command) + b"o")),
        ("EXT1", ("RAW", b"\x82\x01")),
        ("NEWOBJ_EX", ("RAW", opcodes(order) + b")}\x92")),
        ("PERSID", ("RAW", f"P{command}\n".encode())),
        ("damaged", ("RAW", opcodes(tensor) + b")\x81")),
        ("damaged", ("REDUCE", command, (command,))),  # calls a text
        ("damaged", ("BUILD", tensor, {"__call__": "system"})),
        ("damaged", ("BUILD", order, (None, {"__setstate__": 1}))),
        ("no storage", ("PERSID", command)),
        ("OrderedDict", ("REDUCE", order, ([("a", command)],))),
        ("FloatStorage", ("REDUCE", ("GLOBAL", "torch", "FloatStorage"), (command,))),
        ("another kind", view(order, 0, (1,), (1,))),
        ("no storage", ("PERSID", ("storage", order, "0", "cpu", 1))),
    ):
        yield says, b"\x80\x04" + opcodes(value) + b"."


def test_no_pickle_reaches_anything(tmp_path):
    sentinel = tmp_path / "sentinel"
    for says, pickled in hostile(sentinel):
        assert says in refusal(torch_zip(tmp_path / "w.pth", pickled, {}))
        root = {"optimizer": ("RAW", pickled[2:-1]), "model": {"a": whole("0", VALUES)}}  # where the value would be dropped
        refusal(torch_zip(tmp_path / "w.pth", root, {"0": VALUES}))
        assert not sentinel.exists(), says
    pickle.loads(next(pickled for says, pickled in hostile(sentinel) if says == "builtins.eval"))
    assert sentinel.exists(), "these pickles are harmless: the test shows nothing"


def test_state_that_poses_as_an_attribute_changes_nothing(tmp_path):
    array = VALUES.astype(np.float32)
    poses = {"items": 1, "get": ("GLOBAL", "torch", "Size"), "__class__": ("GLOBAL", "torch", "device"), "__setstate__": None}
    weights = ("BUILD", {"a": whole("0", array)}, poses)
    root = {"model": ("BUILD", weights, (None, poses)), "args": ("BUILD", ("RAW", b"cargparse\nNamespace\n)\x81"), poses)}
    np.testing.assert_array_equal(read_all(torch_zip(tmp_path / "w.pth", root, {"0": array}))["a"], array)


@pytest.mark.parametrize(
    ("pickled", "says"),
    [
        (b"}r\xff\xff\xff\xff.", "no named tensors"),  # a memo index for which pickle would take 64 GiB
        (b"\x8d" + struct.pack("<Q", 2**62) + b"a.", ""),  # a text of that length
        (b"\x8b" + struct.pack("<i", 2**31 - 1) + b"a.", ""),  # an integer of that length
        (b"}" * 10**6 + b".", "opcodes"),
        (b")q\x00" + b"h\x00h\x00\x86q\x00" * 60 + b"}h\x00Ns.", "no named tensors"),  # as a key it would be hashed 2^60 times
        (b"}q\x00X\x05\x00\x00\x00modelh\x00s.", "no named tensors"),  # a mapping that holds itself
        (b"}" + b"a" * 17 * 2**20, "bytes"),
    ],
)
def test_no_pickle_takes_memory_or_time(pickled, says, tmp_path):
    path = torch_zip(tmp_path / "w.pth", b"\x80\x04" + pickled, {})
    tracemalloc.start()
    assert says in refusal(path)
    assert tracemalloc.get_traced_memory()[1] < 250e6
    tracemalloc.stop()


@pytest.mark.parametrize(
    ("offset", "shape", "strides"),
    [
        (0, (25,), (1,)),
        (1, (4, 6), (6, 1)),
        (0, (30,), (0,)),
        (0, (2**62, 4), (0, 1)),
        (-1, (2,), (1,)),
        (0, (-4, -6), (6, 1)),
        (0, (4,), (6, 1)),
        (0, (2, 2), (22, 2)),
        (0, (1,) * 65, (1,) * 65),
    ],
)
def test_a_view_lies_within_its_storage(offset, shape, strides, tmp_path):
    array = VALUES.astype(np.float32)
    refusal(torch_zip(tmp_path / "w.pth", {"a": view(storage("0", array), offset, shape, strides)}, {"0": array}))


def test_archives_that_torch_does_not_write(tmp_path):
    array, path, root = VALUES.astype(np.float32), tmp_path / "w.pth", {"a": whole("0", VALUES.astype(np.float32))}
    assert "compressed" in refusal(torch_zip(path, root, {"0": array}, compression=zipfile.ZIP_DEFLATED))
    assert "little-endian" in refusal(torch_zip(path, root, {"0": array}, members={"byteorder": b"big"}))
    assert "TorchScript" in refusal(torch_zip(path, root, {"0": array}, members={"constants.pkl": b""}))
    assert "data/0" in refusal(torch_zip(path, root, {}))
    assert "says otherwise" in refusal(torch_zip(path, root, {"0": array[:3]}))
    module = ("REDUCE", ("GLOBAL", "torch.nn.modules.linear", "Linear"), ())
    assert "torch.nn.modules.linear.Linear" in refusal(torch_zip(path, module, {}))


def test_zip_bombs(tmp_path):
    np.savez_compressed(tmp_path / "w.npz", a=np.zeros(20_000_000, np.float32))
    array = np.ones(60_000, np.float32)  # many views of one storage
    torch_zip(tmp_path / "w.pth", {f"a{index}": whole("0", array) for index in range(400)}, {"0": array})
    for name in ("w.npz", "w.pth"):
        assert "more than" in refusal(tmp_path / name)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n", "git-lfs pointer"),
        (b"\n<!DOCTYPE html>\n<html><body>Not found</body></html>", "HTML page"),
        (pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2) + pickle.dumps({"a": 1}, 2), "safetensors.torch.save_file"),
        (b"w.pth".ljust(257, b"\0") + b"ustar", "safetensors.torch.save_file"),
        (b'{"weight_map": {"a": "model-00001.safetensors"}}', "unknown"),
        (b"PK\x03\x04", "incomplete"),
        (b"PK\x05\x06" + bytes(18), "without"),
        (struct.pack("<Q", 2**40) + b"{}", "header"),
        (struct.pack("<Q", 2) + b"{}", "no tensors"),
        (struct.pack("<Q", 0x4B50) + b"{}".ljust(0x4B50), "no tensors"),  # a length that reads PK, as a zip archive starts
    ],
)
def test_what_is_given_for_weights_by_mistake(content, says, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(content)
    assert says in refusal(tmp_path / "model.safetensors")


def test_paths_that_are_no_file(tmp_path):
    assert "folder" in refusal(tmp_path)
    assert "No such file" in refusal(tmp_path / "none.pth")
    os.mkfifo(tmp_path / "pipe")  # whoever opened it would wait for ever
    assert "no regular file" in refusal(tmp_path / "pipe")
    np.savez(tmp_path / "objects.npz", a=np.array([Evil(os.system, "true")], dtype=object))
    assert "pickled" in refusal(tmp_path / "objects.npz")


@pytest.mark.parametrize("suffix", [".npz", ".pth"])  # safetensors has no checksums
def test_a_damaged_tensor_leaves_the_others_readable(suffix, tmp_path):
    path = write(tmp_path / f"w{suffix}", {"good": VALUES.astype(np.float32), "bad": np.full(9999, 7, np.float32)})
    content = path.read_bytes()
    path.write_bytes(content.replace(struct.pack("<f", 7) * 2, b"damaged!", 1))
    with tensors.opened(path) as file:
        np.testing.assert_array_equal(file.tensors["good"].read(), VALUES)
        with pytest.raises(config.InputError, match="'bad'"):
            file.tensors["bad"].read()


@SUFFIXES
def test_damage_anywhere_is_an_input_error_or_harmless(suffix, tmp_path):
    arrays = {"a/kernel": VALUES.astype(np.float32), "b": VALUES.astype(ml_dtypes.bfloat16), "c": VALUES}
    path, rng = write(tmp_path / f"w{suffix}", arrays), random.Random(0)
    content, refused, digests = path.read_bytes(), [], set()
    cases = [content[:length] for length in {*range(0, len(content), 29), len(content) - 1}]
    for _ in range(400):
        flipped = bytearray(content)
        for _ in range(rng.choice((1, 1, 3))):
            flipped[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        cases.append(bytes(flipped))
    for case in cases:
        path.write_bytes(case)
        try:
            found = read_all(path)
        except config.InputError as error:
            refused.append(str(error))
        else:
            assert len(case) == len(content), "a truncated file was read"
            digests.add(hashlib.md5(b"".join(values.tobytes() for values in found.values())).digest())
    assert all(message.startswith(str(path)) and "\n" not in message for message in refused)
    assert len(refused) > len(cases) // 4
    if suffix != ".safetensors":
        assert len(digests) <= 3, "zip's checksums let damaged values through"
