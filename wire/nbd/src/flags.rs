//! Flag words of the protocol.

/// Handshake flag (server): understands fixed newstyle.
pub const HANDSHAKE_FIXED_NEWSTYLE: u16 = 1;
/// Handshake flag (server): can leave out the 124 zeroes after EXPORT_NAME. The client's flags are the same.
pub const HANDSHAKE_NO_ZEROES: u16 = 2;

/// Transmission flag: the other flags mean something.
pub const HAS_FLAGS: u16 = 1 << 0;
/// Transmission flag: no writes.
pub const READ_ONLY: u16 = 1 << 1;
/// Transmission flag: FLUSH is there.
pub const SEND_FLUSH: u16 = 1 << 2;
/// Transmission flag: force unit access is there.
pub const SEND_FUA: u16 = 1 << 3;
/// Transmission flag: TRIM is there.
pub const SEND_TRIM: u16 = 1 << 5;
/// Transmission flag: WRITE_ZEROES is there.
pub const SEND_WRITE_ZEROES: u16 = 1 << 6;
/// Transmission flag: reads may ask not to be fragmented.
pub const SEND_DF: u16 = 1 << 7;
/// Transmission flag: several connections see each other's flushed writes.
pub const CAN_MULTI_CONN: u16 = 1 << 8;
/// Transmission flag: CACHE is there.
pub const SEND_CACHE: u16 = 1 << 10;
/// Transmission flag: zeroing may be asked to be fast or to fail.
pub const SEND_FAST_ZERO: u16 = 1 << 11;
/// Transmission flag: block status requests may choose contexts in a payload.
pub const BLOCK_STAT_PAYLOAD: u16 = 1 << 12;

/// Command flag: durable before the reply.
pub const CMD_FUA: u16 = 1 << 0;
/// Command flag of WRITE_ZEROES: the space stays allocated.
pub const CMD_NO_HOLE: u16 = 1 << 1;
/// Command flag of READ: one chunk.
pub const CMD_DF: u16 = 1 << 2;
/// Command flag of BLOCK_STATUS: one descriptor per context.
pub const CMD_REQ_ONE: u16 = 1 << 3;
/// Command flag of WRITE_ZEROES: fail rather than be slow.
pub const CMD_FAST_ZERO: u16 = 1 << 4;
/// Command flag with extended headers: `length` counts payload bytes that follow.
pub const CMD_PAYLOAD_LEN: u16 = 1 << 5;

/// Chunk flag: the last one of its reply.
pub const REPLY_DONE: u16 = 1;

/// Bit of `base:allocation`: nothing allocated.
pub const STATE_HOLE: u32 = 1;
/// Bit of `base:allocation`: reads as zeroes.
pub const STATE_ZERO: u32 = 2;
/// Context `qemu:dirty-bitmap:…`: was written.
pub const STATE_DIRTY: u32 = 1;
