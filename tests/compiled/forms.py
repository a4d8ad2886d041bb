"""Which forms of PTX the emulator knows: those that are a function of their operands, by the interpreter's names."""

from __future__ import annotations

import re
from pathlib import Path

MACHINE = (Path(__file__).parent / "emulator/machine.h").read_text()
OPS = {
    name: number
    for number, name in enumerate(
        re.findall(r"\w+", re.sub(r"//.*", "", re.search(r"enum Op : u16 \{(.*?)\};", MACHINE, re.S)[1]))
    )
}

# Instructions that are a function of their operands: the interpreter's name, then PTX's.
FORMS = """
MOV_B32 mov.{b16,u16,s16,b32,u32,s32,f32}      MOV_B64 mov.{b64,u64,s64} cvta.{to.global,param}.u64  MOV_PRED mov.pred
CVT_S32_S8 cvt.s32.s8       CVT_S16_S8 cvt.s8.s32 cvt.s16.s8        CVT_U32_U8 cvt.{u32.u8,u16.u8,u8.u32}
CVT_S32_S16 cvt.s32.s16     CVT_U32_U16 cvt.{u32.u16,u16.u32}       CVT_U64_U32 cvt.u64.u32
CVT_S64_S32 cvt.s64.s32     CVT_U32_U64 cvt.u32.u64     CVT_U16_U64 cvt.u16.u64
CVT_F32_F16 cvt.f32.f16     CVT_F32_BF16 cvt.f32.bf16   CVT_F16_F32 cvt.rn.f16.f32      CVT_BF16_F32 cvt.rn.bf16.f32
CVT_F16X2_F32 cvt.rn.f16x2.f32      CVT_BF16X2_F32 cvt.rn.bf16x2.f32    CVT_TF32_F32 cvt.rna.tf32.f32
CVT_F32_S32 cvt.rn.f32.s32  CVT_F32_U32 cvt.rn.f32.u32  CVT_S32_F32 cvt.rzi.s32.f32
ADD_B16 add.{s16,u16}       ADD_B32 add.{s32,u32}       ADD_B64 add.{s64,u64}       ADD_F32 add{,.rn}{,.ftz}.f32
SUB_B16 sub.{s16,u16}       SUB_B32 sub.{s32,u32}       SUB_B64 sub.{s64,u64}       SUB_F32 sub{,.rn}{,.ftz}.f32
MUL_B16 mul.lo.{s16,u16}    MUL_B32 mul.lo.{s32,u32}    MUL_B64 mul.lo.{s64,u64}    MUL_F32 mul{,.rn}{,.ftz}.f32
MUL_WIDE_S32 mul.wide.s32   MUL_WIDE_U32 mul.wide.u32   MUL_HI_S32 mul.hi.s32       MUL_HI_U32 mul.hi.u32
MUL_HI_U64 mul.hi.u64
MAD_B32 mad.lo.{s32,u32}    MAD_B64 mad.lo.{s64,u64}    MAD_WIDE_S32 mad.wide.s32   MAD_WIDE_U32 mad.wide.u32
MUL_WIDE_U16 mul.wide.u16   MAD_WIDE_U16 mad.wide.u16
FMA_F32 fma.rn{,.ftz}.f32   DIV_F32 div.{rn,full,approx}{,.ftz}.f32
DIV_S32 div.s32     DIV_U32 div.u32     DIV_S64 div.s64     DIV_U64 div.u64
REM_S32 rem.s32     REM_U32 rem.u32     REM_S64 rem.s64     REM_U64 rem.u64
MIN_S32 min.s32     MIN_U32 min.u32     MIN_S64 min.s64     MIN_U64 min.u64     MIN_F32 min{,.ftz}.f32
MAX_S32 max.s32     MAX_U32 max.u32     MAX_S64 max.s64     MAX_U64 max.u64     MAX_F32 max{,.ftz}.f32
MAX_RELU_S32 max.relu.s32
AND_B32 and.{b16,b32}       AND_B64 and.b64     AND_PRED and.pred       OR_B32 or.{b16,b32}         OR_B64 or.b64
OR_PRED or.pred     XOR_B32 xor.{b16,b32}       XOR_B64 xor.b64         XOR_PRED xor.pred
NOT_B16 not.b16     NOT_B32 not.b32     NOT_B64 not.b64     NOT_PRED not.pred
NEG_S32 neg.s32     NEG_S64 neg.s64     NEG_F32 neg{,.ftz}.f32      ABS_S32 abs.s32     ABS_F32 abs{,.ftz}.f32
SHL_B16 shl.b16     SHL_B32 shl.b32     SHL_B64 shl.b64     SHR_S16 shr.s16     SHR_S32 shr.s32     SHR_S64 shr.s64
SHR_U32 shr.{u16,b16,u32,b32}           SHR_U64 shr.{u64,b64}
BFE_S32 bfe.s32     BFE_U32 bfe.u32     BFI_B32 bfi.b32     BFI_B64 bfi.b64     PRMT_B32 prmt.b32
POPC_B32 popc.b32   POPC_B64 popc.b64   BREV_B32 brev.b32   BFIND_SHIFTAMT_U32 bfind.shiftamt.u32
SELP_B32 selp.{b16,u16,s16,b32,u32,s32,f32}     SELP_B64 selp.{b64,u64,s64}
EX2_F32 ex2.approx{,.ftz}.f32           LG2_F32 lg2.approx{,.ftz}.f32           RCP_F32 rcp.{rn,approx}{,.ftz}.f32
SQRT_F32 sqrt.{rn,approx}{,.ftz}.f32    RSQRT_F32 rsqrt.approx{,.ftz}.f32
SETP_EQ_S16 setp.eq.{b16,s16,u16}       SETP_NE_S16 setp.ne.{b16,s16,u16}
SETP_EQ_B32 setp.eq.{b32,s32,u32}       SETP_NE_B32 setp.ne.{b32,s32,u32}
SETP_LT_S32 setp.lt.s32     SETP_LE_S32 setp.le.s32     SETP_GT_S32 setp.gt.s32     SETP_GE_S32 setp.ge.s32
SETP_LT_U32 setp.{lt,lo}.{u16,u32}  SETP_LE_U32 setp.{le,ls}.{u16,u32}
SETP_GT_U32 setp.{gt,hi}.{u16,u32}  SETP_GE_U32 setp.{ge,hs}.{u16,u32}
SETP_EQ_B64 setp.eq.{b64,s64,u64}       SETP_NE_B64 setp.ne.{b64,s64,u64}
SETP_LT_S64 setp.lt.s64     SETP_LE_S64 setp.le.s64     SETP_GT_S64 setp.gt.s64     SETP_GE_S64 setp.ge.s64
SETP_LT_U64 setp.lt.u64     SETP_LE_U64 setp.le.u64     SETP_GT_U64 setp.gt.u64     SETP_GE_U64 setp.ge.u64
SETP_EQ_F32 setp.eq{,.ftz}.f32      SETP_NE_F32 setp.ne{,.ftz}.f32      SETP_LT_F32 setp.lt{,.ftz}.f32
SETP_LE_F32 setp.le{,.ftz}.f32      SETP_GT_F32 setp.gt{,.ftz}.f32      SETP_GE_F32 setp.ge{,.ftz}.f32
SETP_EQU_F32 setp.equ{,.ftz}.f32    SETP_NEU_F32 setp.neu{,.ftz}.f32    SETP_LTU_F32 setp.ltu{,.ftz}.f32
SETP_LEU_F32 setp.leu{,.ftz}.f32    SETP_GTU_F32 setp.gtu{,.ftz}.f32    SETP_GEU_F32 setp.geu{,.ftz}.f32
SETP_NUM_F32 setp.num{,.ftz}.f32    SETP_NAN_F32 setp.nan{,.ftz}.f32
SETP_GT_BF16 setp.gt.bf16   SETP_GT_F16 setp.gt.f16     SETP_GT_BF16X2 setp.gt.bf16x2   SETP_GT_F16X2 setp.gt.f16x2
SHFL_IDX shfl.sync.idx.b32  SHFL_UP shfl.sync.up.b32    SHFL_DOWN shfl.sync.down.b32    SHFL_BFLY shfl.sync.bfly.b32
REDUX_ADD redux.sync.add.{s32,u32}      REDUX_MIN_S32 redux.sync.min.s32        REDUX_MAX_S32 redux.sync.max.s32
REDUX_OR redux.sync.or.b32              BALLOT vote.sync.ballot.b32
MMA_F16 mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32
MMA_BF16 mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32
MMA_TF32 mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32
LABEL -     TRAP trap       BAR_WARP bar.warp.sync      BAR_ALIGNED bar.sync        BAR barrier.sync  ELECT elect.sync
CP_COMMIT cp.async.commit_group         WGMMA_FENCE wgmma.fence.sync.aligned
WGMMA_COMMIT wgmma.commit_group.sync.aligned            PROXY_FENCE fence.proxy.async{,.shared::cta}
NOTHING fence.mbarrier_init.release.cluster             REGISTERS_INC setmaxnreg.inc.sync.aligned.u32
REGISTERS_DEC setmaxnreg.dec.sync.aligned.u32           MBARRIER_INIT mbarrier.init{,.shared,.shared::cta}.b64
MBARRIER_INVAL mbarrier.inval{,.shared,.shared::cta}.b64
MBARRIER_ARRIVE mbarrier.arrive{,.shared,.shared::cta}.b64
MBARRIER_EXPECT mbarrier.arrive.expect_tx{,.shared,.shared::cta}.b64
MBARRIER_WAIT mbarrier.try_wait.parity{,.shared,.shared::cta}.b64
"""


def _expand(form: str) -> list[str]:
    choice = re.search(r"\{([^}]*)\}", form)
    if not choice:
        return [form]
    return [f for one in choice[1].split(",") for f in _expand(form[: choice.start()] + one + form[choice.end() :])]


def _table() -> dict[str, str]:
    table, name = {}, ""
    for word in FORMS.split():
        if word in OPS:
            name = word
        else:
            table |= dict.fromkeys(_expand(word), name)
    return table


TABLE = _table()
