/* What the kernels are launched with, shared with Rust through bindgen.
 *
 * Plain C, no includes: fixed-width integers, pointers, plain structs. Every kernel takes one struct, by value. */
#pragma once

enum {
  /* Dimensions before the last one of a tensor that is taken as rows. */
  OXI_MAX_OUTER = 7,
};

/* Dtypes that a kernel tells apart at run time. */
enum {
  OXI_F32 = 0,
  OXI_BF16 = 1,
  OXI_F16 = 2,
};

/* The rows of tensors (..., dim): the sizes of their leading dimensions, merged where every tensor allows it. */
struct OxiRows {
  long long count;
  int ndim;
  int reserved;
  long long size[OXI_MAX_OUTER];
};

/* A tensor of rows. Strides in elements. */
struct OxiRowTensor {
  void *data;
  long long stride[OXI_MAX_OUTER];
  /* Between elements of a row. */
  long long step;
};

/* A tensor of one dimension. */
struct OxiVector {
  void *data;
  long long step;
  int dtype;
  int reserved;
};

/* Tensors of N dimensions, 0 strides for those that they lack or are expanded along. */
struct OxiTensor2 {
  void *data;
  long long stride[2];
};

struct OxiTensor3 {
  void *data;
  long long stride[3];
};

struct OxiTensor4 {
  void *data;
  long long stride[4];
};

struct OxiTensor5 {
  void *data;
  long long stride[5];
};

/* z: of no meaning to instances without a gate. bias.data: null where not given. warps: how many share a group of a row.
 * dense: all tensors' rows are dense and aligned to 16 bytes, groups too; where an instance keeps them on the chip they
 * always are. */
struct OxiNormForward {
  struct OxiRows rows;
  struct OxiRowTensor x;
  struct OxiRowTensor z;
  struct OxiRowTensor out;
  struct OxiVector weight;
  struct OxiVector bias;
  int dim;
  int group_size;
  float eps;
  int warps;
  int dense;
  int reserved;
};

/* As above. partials: (blocks, dim), or with bias (blocks, 2, dim): the gradients of weight and bias that each block of
 * rows adds; with bias no instance that keeps rows on the chip. */
struct OxiNormBackward {
  struct OxiRows rows;
  struct OxiRowTensor x;
  struct OxiRowTensor z;
  struct OxiRowTensor dout;
  struct OxiRowTensor dx;
  struct OxiRowTensor dz;
  struct OxiVector weight;
  struct OxiVector bias;
  float *partials;
  int blocks;
  int dim;
  int group_size;
  float eps;
  int warps;
  int dense;
};

/* dbias.data: null where there is no bias. */
struct OxiNormParameters {
  const float *partials;
  struct OxiVector dweight;
  struct OxiVector dbias;
  int blocks;
  int dim;
};

/* D, z, dt_bias, intermediate, indices: data null where not given.
 *
 * What every call reads comes first, together: at batch 1 a kernel waits longest for its params. */
struct OxiStateUpdate {
  int seqlen;
  int heads_per_group;
  int dim;
  int dstate;
  /* Lanes that share a row of the state, 8 elements each. */
  int lanes_log2;
  /* dt, dt_bias and A are the same for all rows of a head. */
  int one_decay;
  int dt_softplus;
  /* Whether these are fp32, otherwise of x's dtype. */
  int wide_dt;
  int wide_dt_bias;
  int wide_A;
  int wide_D;
  int intermediate_dtype;
  long long slots;
  const void *indices;
  struct OxiTensor4 state;        /* slots, nheads, dim, dstate */
  struct OxiTensor4 x;            /* batch, seqlen, nheads, dim */
  struct OxiTensor4 dt;           /* batch, seqlen, nheads, dim */
  struct OxiTensor2 dt_bias;      /* nheads, dim */
  struct OxiTensor3 A;            /* nheads, dim, dstate */
  struct OxiTensor4 B;            /* batch, seqlen, ngroups, dstate */
  struct OxiTensor4 C;            /* batch, seqlen, ngroups, dstate */
  struct OxiTensor2 D;            /* nheads, dim */
  struct OxiTensor4 out;          /* batch, seqlen, nheads, dim */
  struct OxiTensor4 z;            /* batch, seqlen, nheads, dim */
  struct OxiTensor5 intermediate; /* slots, seqlen, nheads, dim, dstate */
  long long indices_step;
  int indices_are_64_bit;
  int reserved;
};

/* Bits of `dense`: tensors whose lines move in packs, along channels or along tokens, and weight by rows of taps. */
enum {
  OXI_CONV_X = 1,
  OXI_CONV_OUT = 2,
  OXI_CONV_DOUT = 4,
  OXI_CONV_DX = 8,
  OXI_CONV_WEIGHT = 16,
};

enum {
  OXI_MAX_CONV_WIDTH = 8,
  /* Taps of the instances for one width alone. */
  OXI_EXACT_CONV_WIDTH = 4,
  /* Threads of a block along channels at most: few, as registers then leave room for more blocks. */
  OXI_CONV_LINE_THREADS = 64,
  /* Warps of a block along tokens, each with a channel. */
  OXI_CONV_CHANNEL_WARPS = 4,
  /* Tokens of a span where documents are marked. */
  OXI_MAX_MARKED_TOKENS = 2048,
};

/* bias, states, seq_idx, cu_seqlens: data null where not given. States (rows, dim, width - 1). */
struct OxiConv {
  int dim;
  int width;
  int seqlen;
  /* Of cu_seqlens; without it 1. */
  int ndocs;
  int silu;
  int dense;
  /* Whether these are fp32, otherwise of x's dtype. */
  int wide_weight;
  int wide_initial_states;
  /* With cu_seqlens: initial states are each document's, otherwise the first one's. */
  int state_a_document;
  /* Blocks that share the channels of a span; tokens of a span; spans of a sequence, of all sequences. */
  unsigned channel_blocks;
  int tokens;
  unsigned spans_of_sequence;
  unsigned spans;
  int cu_seqlens_are_64_bit;
  struct OxiTensor3 x;   /* batch, dim, seqlen */
  struct OxiTensor3 out; /* batch, dim, seqlen */
  struct OxiTensor2 weight;
  struct OxiVector bias;
  struct OxiTensor3 initial_states;
  struct OxiTensor3 final_states;
  const int *seq_idx;
  long long seq_idx_stride[2];
  const void *cu_seqlens;
  long long cu_seqlens_step;
};

/* partials: (blocks of spans, width + 1, dim), what each adds to dweight (a tap a row), then to dbias. Of `conv` out and
 * final_states are not used. */
struct OxiConvBackward {
  struct OxiConv conv;
  struct OxiTensor3 dout; /* null: there is none */
  struct OxiTensor3 dx;
  struct OxiTensor3 dfinal_states;
  struct OxiTensor3 dinitial_states;
  float *partials;
  int span_blocks;
  int reserved;
};

/* dbias.data: null where there is no bias. */
struct OxiConvParameters {
  const float *partials;
  struct OxiTensor2 dweight; /* dim, width */
  struct OxiVector dbias;
  int blocks;
  int dim;
  int width;
  int dweight_dtype;
};

/* As OxiConv; indices as in OxiStateUpdate. */
struct OxiConvUpdate {
  int dim;
  int width;
  int seqlen;
  int state_len;
  int silu;
  int wide_weight;
  int channel_blocks;
  int indices_are_64_bit;
  int cache_seqlens_are_64_bit;
  int batch;
  long long slots;
  const void *indices;
  long long indices_step;
  const void *cache_seqlens;
  long long cache_seqlens_step;
  struct OxiTensor3 state; /* slots, dim, state_len */
  struct OxiTensor3 x;     /* batch, dim, seqlen */
  struct OxiTensor3 out;
  struct OxiTensor2 weight;
  struct OxiVector bias;
  struct OxiTensor4 intermediate; /* slots, seqlen, dim, state_len */
};

struct OxiVarlenStates {
  int dim;
  int state_len;
  int channel_blocks;
  int cu_seqlens_are_64_bit;
  long long total_tokens;
  const void *cu_seqlens;
  long long cu_seqlens_step;
  struct OxiTensor2 x;      /* total_tokens, dim */
  struct OxiTensor3 states; /* ndocs, dim, state_len */
};

enum {
  /* Tokens of a tile of the chunk scan's matrix kernels, at most. */
  OXI_SSD_TILE = 64,
  /* Blocks that first share what a segment adds to a state: the short first launch then fills a GPU better. */
  OXI_SSD_SEGMENT_PARTS = 2,
  /* Shared memory that a block of the kernel for segments' states has where two share a multiprocessor of 9.0. */
  OXI_SSD_STATES_SHARED_BYTES = 113 * 1024,
};

/* The chunk scan, forward. D (nheads, headdim), expanded where it has one value a head. D, z, states, dt_bias, seq_idx,
 * cu_seqlens: data null where not given.
 *
 * dout: null but for a backward with z, where the forward kernels find the gradients of what is multiplied: y silu(z) is not
 * stored, but dz, and in out the gradient of y.
 *
 * The segments of a long sequence are walked at the same time. segment_states: what each part of each but the last adds to
 * the state, by batch, part and head, of one head in an order of the kernel's; segment_decays: the factor by which the state
 * before it decays, 0 where another run begins.
 *
 * entry_states: of Element; for a backward, the states that enter tiles, by batch, slot, head and slice (ssd.cuh). */
struct OxiSsd {
  int seqlen;
  int nheads;
  int heads_per_group;
  int headdim;
  int dstate;
  /* Of cu_seqlens; without it 1. */
  int ndocs;
  int segments;
  int segment_tokens;
  /* Blocks that share a head, how much of headdim each has, and how far apart those parts begin. */
  int slices;
  int slice;
  int slice_step;
  /* Compute segment_states and segment_decays alone, a block a part. */
  int states_only;
  int dt_softplus;
  float dt_min;
  float dt_max;
  /* Whether these are fp32, otherwise of x's dtype. */
  int wide_dt;
  int wide_D;
  int wide_initial_states;
  int varlen_dtype;
  /* With cu_seqlens: initial states are each document's, otherwise the first one's. */
  int state_a_document;
  int cu_seqlens_are_64_bit;
  /* Elements that move at once where x, B and C are copied to shared memory, and how many tiles it holds. */
  int width;
  int stages;
  /* Of entry_states: tokens of a slot, how many slots a sequence's tokens have, how many it has in all. */
  int slot_tokens;
  int token_slots;
  int entry_slots;
  /* Whether to write entry_states. Otherwise segments begin with those that are there, if any. */
  int keeps_entry_states;
  struct OxiTensor4 x;              /* batch, seqlen, nheads, headdim */
  struct OxiTensor3 dt;             /* batch, seqlen, nheads */
  struct OxiVector A;
  struct OxiVector dt_bias;
  struct OxiTensor4 B;              /* batch, seqlen, ngroups, dstate */
  struct OxiTensor4 C;              /* batch, seqlen, ngroups, dstate */
  struct OxiTensor2 D;              /* nheads, headdim */
  struct OxiTensor4 z;              /* batch, seqlen, nheads, headdim */
  struct OxiTensor4 out;            /* batch, seqlen, nheads, headdim */
  struct OxiTensor4 dout;           /* batch, seqlen, nheads, headdim */
  struct OxiTensor4 dz;             /* batch, seqlen, nheads, headdim */
  struct OxiTensor4 initial_states; /* rows, nheads, headdim, dstate */
  struct OxiTensor4 final_states;   /* batch, nheads, headdim, dstate */
  struct OxiTensor4 varlen_states;  /* ndocs, nheads, headdim, dstate */
  float *segment_states;
  float *segment_decays;
  void *entry_states;
  const int *seq_idx;
  long long seq_idx_stride[2];
  const void *cu_seqlens;
  long long cu_seqlens_step;
};

/* A tensor as bulk copies know it, made by the driver. */
struct __attribute__((aligned(64))) OxiTensorMap {
  unsigned long long word[16];
};

/* x, B and C by boxes of 64 tokens and 64 elements, out by boxes of 16 tokens; of any dtype of 16 bits. */
struct OxiSsdMapped {
  struct OxiTensorMap x;
  struct OxiTensorMap B;
  struct OxiTensorMap C;
  struct OxiTensorMap out;
  struct OxiSsd ssd;
};

/* The chunk scan, backward, in launches that share these (ssd_bwd.cuh): cuts, walks along the states, tiles, parameters.
 * Of `ssd` z, out, dout and dz are not used, `slices` do not overlap, and final_states and varlen_states are their gradients,
 * as initial_states are the states: data null where there is none.
 *
 * exit_states: the gradients of the states that leave tiles, as ssd.entry_states are those that enter them.
 * ssd.segment_states: what segments add to the states, then to their gradients, by batch, order in which they
 * are walked, head and slice; ssd.segment_decays: by direction, batch, order and head.
 *
 * partials (batch windows, nheads (2 + dD_columns)): what the tiles of a window add to dA, ddt_bias and dD, in this order, of
 * all heads each. */
struct OxiSsdBackward {
  struct OxiSsd ssd;
  struct OxiTensor4 dy; /* batch, seqlen, nheads, headdim: the gradient of what z gates, or of out */
  struct OxiTensor4 dx; /* batch, seqlen, nheads, headdim */
  struct OxiTensor3 ddt;
  struct OxiTensor4 dB;              /* batch, seqlen, ngroups, dstate */
  struct OxiTensor4 dC;              /* batch, seqlen, ngroups, dstate */
  struct OxiTensor4 dinitial_states; /* rows, nheads, headdim, dstate */
  struct OxiVector dA;
  struct OxiVector ddt_bias;
  struct OxiTensor2 dD; /* nheads, dD_columns */
  void *exit_states;
  /* Of wgmma kernels, by batch, head and token: dt, then of all tokens log2 of the decay from the tile's start, then dt's
   * derivative. */
  float *tokens;
  float *partials;
  /* By sequence and window: of its tokens bit i says whether a run begins with the i-th; the last token up to its first one
   * with which a run begins. Null where a sequence is one run. */
  unsigned long long *marks;
  int *run_starts;
  /* Windows of OXI_SSD_TILE tokens of a sequence. */
  int windows;
  /* Slots of a sequence's exit_states: those of tokens, of documents, where they have gradients, and one more. */
  int document_slots;
  int exit_slots;
  /* Whether states are walked forward too: entry_states are to be found yet. */
  int finds_entry_states;
  /* Blocks of a walk that share a state's columns. */
  int column_parts;
  int batch;
  int ngroups;
  /* 0: no D; 1: one a head; else headdim. */
  int dD_columns;
  int dD_dtype;
  int wide_ddt;
  int wide_dinitial_states;
  int reserved;
};

/* x, dy, B and C by boxes of 64 tokens and 64 elements, dx by boxes of 16 tokens; of any dtype of 16 bits. */
struct OxiSsdBackwardMapped {
  struct OxiTensorMap x;
  struct OxiTensorMap dy;
  struct OxiTensorMap B;
  struct OxiTensorMap C;
  struct OxiTensorMap dx;
  struct OxiSsdBackward bwd;
};

/* dense: rows along dstate move in packs, and take whole ones, in all tensors of states. */
struct OxiChunkStates {
  int nchunks;
  int nheads;
  int headdim;
  int dstate;
  /* Warps and blocks that share a head. */
  int warps_of_head;
  unsigned blocks_of_head;
  int dense;
  int reserved;
};

/* States of chunks (batch, nchunks, nheads, headdim, dstate), of a sequence (batch, nheads, headdim, dstate); decay (batch,
 * nchunks, nheads) of fp32. initial_states: data null where not given. */
struct OxiStatePassing {
  struct OxiChunkStates sizes;
  struct OxiTensor5 states;
  struct OxiTensor5 states_before;
  struct OxiTensor3 decay;
  struct OxiTensor4 initial_states;
  struct OxiTensor4 final_states;
  /* Whether they are fp32, otherwise of states' dtype. */
  int wide_initial_states;
  int reserved;
};

/* partials: (warps_of_head, columns), what each warp adds to ddecay (batch, nheads, nchunks). wide_initial_states: data null
 * unless they are fp32 and states narrower. dstates_before, dfinal_states, dinitial_states: data null where there is none. */
struct OxiStatePassingBackward {
  struct OxiChunkStates sizes;
  struct OxiTensor5 states_before;
  struct OxiTensor5 dstates_before;
  struct OxiTensor5 dstates;
  struct OxiTensor3 decay;
  struct OxiTensor4 wide_initial_states;
  struct OxiTensor4 dfinal_states;
  struct OxiTensor4 dinitial_states;
  float *partials;
  long long columns;
  int wide_dinitial_states;
  int reserved;
};

struct OxiStatePassingDecay {
  const float *partials;
  long long columns;
  struct OxiTensor3 ddecay; /* batch, nchunks, nheads */
  int warps_of_head;
  int nchunks;
  int nheads;
  int reserved;
};
