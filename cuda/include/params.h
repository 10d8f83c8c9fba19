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
