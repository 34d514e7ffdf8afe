package vm

import (
	"encoding/binary"
	"hash/crc32"
)

// The on-disk format of EROFS, as far as an Image needs it: the superblock,
// compact and extended inodes, directory entries; the layouts "flat plain" and
// "flat inline". It is specified by https://docs.kernel.org/filesystems/erofs.html
// and fs/erofs/erofs_fs.h of Linux 6.1. All numbers are little endian.

const (
	erofsBlock       = 4096 // bytes, and the log below
	erofsBlockLog    = 12
	erofsMagic       = 0xe0f5e1e2
	erofsSuperOffset = 1024
	erofsSuperSize   = 128

	// Features that old kernels may ignore: the superblock has a checksum, and
	// its build time stands for modification times.
	erofsChecksum = 1 << 0
	erofsMtime    = 1 << 1

	// erofsSlot is the unit of inode numbers ("nid"): an inode's place is its
	// number times erofsSlot.
	erofsSlot        = 32
	erofsCompactSize = 1 * erofsSlot
	erofsExtendSize  = 2 * erofsSlot

	erofsDirentSize = 12
	erofsMaxName    = 255
	erofsMaxTarget  = 4095 // of a symbolic link

	// erofsTime is the modification time of everything in a store.
	erofsTime = 1
)

// Layouts of an inode's data.
const (
	erofsPlain  = 0 // in whole blocks
	erofsInline = 2 // directly after the inode
)

// Types of files in directory entries.
const (
	erofsTypeFile    = 1
	erofsTypeDir     = 2
	erofsTypeSymlink = 7
)

// Types and permissions of files in inodes: what Nix sees in a store.
const (
	erofsModeFile       = 0o100444
	erofsModeExecutable = 0o100555
	erofsModeDir        = 0o040555
	erofsModeSymlink    = 0o120777
)

// An erofsInode is one inode. Owner and group are always 0, the time is that
// of the superblock.
type erofsInode struct {
	mode   uint16
	layout uint16
	links  uint32
	size   int64
	block  uint32 // first block of the data, if any is in blocks
	ino    uint32 // the number that 32 bit programs see
}

// extended reports whether the inode does not fit into the compact form.
func (n *erofsInode) extended() bool { return n.size > 1<<32-1 || n.links > 1<<16-1 }

// len returns the number of bytes that put writes.
func (n *erofsInode) len() int {
	if n.extended() {
		return erofsExtendSize
	}
	return erofsCompactSize
}

// put writes the inode to b, which is zero.
func (n *erofsInode) put(b []byte) {
	le := binary.LittleEndian
	le.PutUint16(b[4:], n.mode)
	le.PutUint32(b[16:], n.block)
	le.PutUint32(b[20:], n.ino)
	if !n.extended() {
		le.PutUint16(b[0:], n.layout<<1)
		le.PutUint16(b[6:], uint16(n.links))
		le.PutUint32(b[8:], uint32(n.size))
		return
	}
	le.PutUint16(b[0:], n.layout<<1|1)
	le.PutUint64(b[8:], uint64(n.size))
	le.PutUint64(b[32:], erofsTime)
	le.PutUint32(b[44:], n.links)
}

// putErofsDirent writes a directory entry to b; its name lies nameOff bytes
// after the beginning of the directory block.
func putErofsDirent(b []byte, nid uint64, nameOff int, fileType byte) {
	binary.LittleEndian.PutUint64(b, nid)
	binary.LittleEndian.PutUint16(b[8:], uint16(nameOff))
	b[10] = fileType
}

// putErofsSuper writes the superblock into block 0. The rest of the block must
// be final: the checksum covers it.
func putErofsSuper(block0 []byte, root uint16, inodes uint64, blocks uint32) {
	b := block0[erofsSuperOffset:erofsBlock]
	le := binary.LittleEndian
	le.PutUint32(b[0:], erofsMagic)
	le.PutUint32(b[8:], erofsChecksum|erofsMtime)
	b[12] = erofsBlockLog
	le.PutUint16(b[14:], root)
	le.PutUint64(b[16:], inodes)
	le.PutUint64(b[24:], erofsTime)
	le.PutUint32(b[36:], blocks)
	// The checksum is computed with zero in its own place, and is not inverted
	// at the end, unlike crc32.Checksum.
	le.PutUint32(b[4:], ^crc32.Checksum(b, crc32.MakeTable(crc32.Castagnoli)))
}
