"""tools/ptx_report.py: its readers on recorded output, and a planted spill where nvcc is."""

import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

# Appended, not inserted: an installed distaya_ext must win over the source folder.
sys.path.append(str(Path(__file__).resolve().parent.parent))
from tools import cubin, hot_kernels, ptx_report
from tools.hot_kernels import Hot

LINKED = (
    "_ZN7distaya6sqgemm47_GLOBAL__N__d092cf6a_14_sqgemm_cuda_cu_e16000061"
    "5multiply_kernelINS_4bf16ES3_Li8ELi1ELNS0_4BodyE2EEEvNS0_6LaunchE"
)
NAME = "sqgemm_cuda/multiply_kernel<bf16, bf16, 8, 1, 2>"

PTXAS = f"""ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '{LINKED}' for 'sm_90a'
ptxas info    : Function properties for {LINKED}
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 220 registers, used 1 barriers, 1024 bytes smem
ptxas info    : Compile time = 912.010 ms
ptxas info    : Compiling entry function 'spills' for 'sm_80'
ptxas info    : Function properties for spills
    280 bytes stack frame, 544 bytes spill stores, 580 bytes spill loads
ptxas info    : Used 32 registers, used 0 barriers, 280 bytes cumulative stack size
"""

RESOURCES = f"""
Fatbin ptx code:
================
arch = sm_80
code version = [9,0]

Fatbin elf code:
================
arch = sm_90a
code version = [1,8]
host = linux

Resource usage:
 Common:
  GLOBAL:0
 Function {LINKED}:
  REG:220 STACK:0 SHARED:1024 LOCAL:0 CONSTANT[2]:40 CONSTANT[0]:600 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function spills:
  REG:32 STACK:280 SHARED:0 LOCAL:0 CONSTANT[0]:540 TEXTURE:0 SURFACE:0 SAMPLER:0
"""

SASS = f"""
Fatbin elf code:
================
arch = sm_90a

	code for sm_90a
	.target	sm_90a

		Function : {LINKED}
	.headerflags	@"EF_CUDA_ACCELERATORS EF_CUDA_SM90 EF_CUDA_VIRTUAL_SM(EF_CUDA_SM90)"
        /*0000*/                   LDC R1, c[0x0][0x28] ;                  /* 0x00000a00ff017b82 */
                                                                           /* 0x000fe20000000800 */
        /*3fe0*/                   LDGSTS.E.BYPASS.128 [R11], desc[UR10][R8.64], P0 ; /* 0x080b7f */
        /*4370*/              @!P0 HMMA.SP.16832.F32.BF16 R24, R4, R8, R24, R4, 0x0 ; /* 0x723c */
        /*4380*/             @!UP0 UIADD3 UR4, UR4, 0x1, URZ ;             /* 0x0000000104047890 */
        /*14390*/                  HMMA.SP.16832.F32.BF16 R20, R4, R8, R20, R4, 0x1 ; /* 0x723c */
		Function : spills
        /*01f0*/                   STL.64 [R1+0x90], R28 ;                 /* 0x0000901c01007387 */
        /*0220*/               @P3 LDL R19, [R1+0x8c] ;                    /* 0x00008c1301007387 */
"""


def test_the_compilers_report_is_read():
    uses = ptx_report.parse(PTXAS)
    template = "_ZN7distaya4cuda11gemm_kernelINS0_9TileShapeILi64ELi2EEELb1EEEvNS_4GemmE"
    plain = {LINKED: NAME, "spills": "spills", template: "gemm_kernel<TileShape<64, 2>, true>"}
    assert cubin.plain_names(plain) == plain
    assert uses == [
        cubin.Use(LINKED, "sm_90a", 220, 1024, 0, 0),
        cubin.Use("spills", "sm_80", 32, 0, 280, 1124),
    ]


def test_resources_of_a_module_are_read():
    assert cubin.resources(RESOURCES.splitlines()) == [
        cubin.Use(LINKED, "sm_90a", 220, 1024, 0, 0),
        cubin.Use("spills", "sm_90a", 32, 0, 280, 0),
    ]
    listed = ["ELF file    1: _C.so.1.sm_80.cubin", "ELF file    2: _C.so.2.sm_90a.cubin"]
    assert cubin.architectures([*listed, *listed]) == ["sm_80", "sm_90a"]


def test_machine_code_is_counted():
    code = cubin.instructions(SASS.splitlines())
    assert code[LINKED, "sm_90a"] == {
        "LDC": 1,
        "LDGSTS.E.BYPASS.128": 1,
        "HMMA.SP.16832.F32.BF16": 2,
        "UIADD3": 1,
    }
    assert [cubin.local(code[name, "sm_90a"]) for name in (LINKED, "spills")] == [0, 2]


def test_promised_instructions_are_looked_for():
    code = {
        ("good<2>", "sm_80"): Counter({"HMMA.SP.16832.F32.BF16": 3, "LDGSTS.E": 1}),
        ("good<4>", "sm_80"): Counter({"FFMA": 900}),
        ("good<2>", "sm_90a"): Counter({"HGMMA.SP.64x8x32.F32.BF16": 3}),
    }
    sparse = Hot(r"good<2>", (r"HMMA\.SP",), archs="sm_80", never=(r"HMMA\.16816",))
    assert hot_kernels.check(code, (sparse,)) == (["sm_80 good<2>: HMMA\\.SP in 1 kernel"], [])
    wrong = {
        Hot(r"good", (r"HMMA\.SP",), archs="sm_80"): "good<4> on sm_80 holds no instruction HMMA",
        Hot(
            r"gone", (r"HMMA",)
        ): "no kernel on sm_80 is called gone; no kernel on sm_90a is called",
        Hot(r"good<2>", (r"HGMMA\.64",), archs="sm_90a"): "no instruction HGMMA\\.64",
        Hot(r"good<4>", (), archs="sm_80", never=("FFMA",)): "holds the instruction FFMA",
    }
    for hot, sentence in wrong.items():
        assert sentence in "; ".join(hot_kernels.check(code, (hot,))[1])


def test_the_table_of_hot_kernels_names_architectures_that_ship():
    shipped = [f"sm_{a.removesuffix('-real')}" for a in ptx_report.default_archs().split(";")]
    assert len(shipped) >= 6
    for hot in hot_kernels.HOT:
        assert any(hot_kernels.re.fullmatch(hot.archs, arch) for arch in shipped), hot.kernel


def test_what_is_missing_is_said_with_exit_code_2(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert ptx_report.main([]) == 2
    assert capsys.readouterr().err.startswith("nvcc is needed but was not found")
    monkeypatch.setattr(sys, "path", [])
    assert ptx_report.main(["--module", str(Path(__file__))]) == 2
    assert capsys.readouterr().err == (
        "cuobjdump was not found; pip install nvidia-cuda-cuobjdump\n"
    )
    assert ptx_report.main(["--module", "no-such-file"]) == 2
    assert "there is no file no-such-file" in capsys.readouterr().err


def test_a_module_without_kernels_is_said(monkeypatch, capsys):
    monkeypatch.setattr(cubin, "dump", lambda *_: [])
    assert ptx_report.main(["--module", str(Path(__file__))]) == 2
    assert "holds no CUDA machine code" in capsys.readouterr().err


def recorded(_module, option, *_arch):
    """What cuobjdump would have said."""
    listed = "ELF file    1: _C.so.1.sm_90a.cubin"
    return {"-lelf": listed, "-res-usage": RESOURCES, "-sass": SASS}[option].splitlines()


def test_a_spill_in_a_module_fails(monkeypatch, capsys):
    monkeypatch.setattr(cubin, "dump", recorded)
    promised = Hot("multiply", (r"HMMA\.SP",))
    monkeypatch.setattr(hot_kernels.check, "__defaults__", ((promised,),))
    assert ptx_report.main(["--module", str(Path(__file__))]) == 1
    said = capsys.readouterr()
    assert said.err == "spills on sm_90a spills: 2 local ld/st, stack of 280 B\n"
    assert (
        f"{NAME}  220/1024 " in said.out
        and " 32/0 +2 " in said.out
        and "2 kernels, 1 architectures: 1 spill" in said.out
    )
    hot = ["--module", str(Path(__file__)), "--hot", "multiply", "--brief"]
    assert ptx_report.main(hot) == 0
    assert NAME not in capsys.readouterr().out


PLANTED = """
extern "C" __global__ void planted(float* x, int n) {
  float v[64];
#pragma unroll
  for (int i = 0; i < 64; ++i) v[i] = x[i * 32 + threadIdx.x];
  for (int k = 0; k < n; ++k) {
#pragma unroll
    for (int i = 0; i < 64; ++i) v[i] = v[i] * v[(i + 7) % 64] + k;
  }
#pragma unroll
  for (int i = 0; i < 64; ++i) x[i * 32 + threadIdx.x] = v[i];
}
"""


@pytest.mark.skipif(not shutil.which("nvcc"), reason="nvcc is not on this machine")
def test_a_planted_spill_is_found(tmp_path, capsys):
    (tmp_path / "planted.cu").write_text(PLANTED)
    module = tmp_path / "planted.cubin"
    build = ["nvcc", "-arch=sm_80", "-Xptxas=-v", "-cubin", "-o", str(module), "planted.cu"]
    for registers in (32, 255):
        limit = f"-maxrregcount={registers}"
        run = subprocess.run([*build, limit], cwd=tmp_path, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        (use,) = ptx_report.parse(run.stdout + run.stderr)
        assert use.registers <= registers and (use.spilled > 0) == (registers == 32)
        try:
            cubin.find("cuobjdump"), cubin.find("nvdisasm")
        except cubin.Missing:
            continue  # the compiler's word is all there is; CI installs both
        assert ptx_report.main(["--module", str(module)]) == 1  # no kernel of HOT is in it
        assert ("planted on sm_80 spills" in capsys.readouterr().err) == (registers == 32)
