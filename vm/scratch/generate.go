//go:build ignore

// Generate makes the templates of scratch disks, in the current directory, with
// the mke2fs of e2fsprogs 1.47 (Debian: apt install e2fsprogs):
//
//	go generate ./vm
//
// Each is an empty ext4 file system, of which it keeps the blocks that are not
// zero: records of offset (u64), length (u32), both little endian, and bytes,
// compressed together by zlib. The same mke2fs makes the same bytes.
package main

import (
	"bytes"
	"compress/zlib"
	"encoding/binary"
	"errors"
	"fmt"
	"log"
	"os"
	"os/exec"
	"path/filepath"

	"golang.org/x/sys/unix"
)

const (
	blockSize = 4096
	// id is the file systems' UUID and the seed of their directory hashes.
	id = "6e62642d-7363-7261-7463-682d66737631"
)

// options of mke2fs, and why:
//
//   - no journal: the guest is disposable;
//   - uninit_bg without flex_bg: all groups but the first and the last are
//     described by their descriptors alone, so that there is next to nothing to
//     write;
//   - prezeroed storage: the inode tables count as zeroed, so that the guest's
//     kernel does not start to zero them, and they take no space on the host;
//   - sparse_super2 without backups, no resize_inode: nothing else to write;
//   - ext_attr: an overlay needs trusted.overlay.* on its upper directory;
//   - an inode for each 16 KiB: source trees have many small files, and unused
//     inodes cost nothing here.
var options = []string{
	"-q", "-F", "-t", "ext4", "-b", "4096", "-I", "256", "-i", "16384", "-m", "0", "-U", id,
	"-O", "none,extent,filetype,dir_index,ext_attr,sparse_super2,uninit_bg,large_file,huge_file,dir_nlink,extra_isize",
	"-E", "nodiscard,assume_storage_prezeroed=1,num_backup_sb=0,root_owner=0:0,hash_seed=" + id,
}

func main() {
	log.SetFlags(0)
	for gib := 1; gib <= 1024; gib *= 2 {
		if err := generate(gib); err != nil {
			log.Fatalf("make template of %d GiB: %v", gib, err)
		}
	}
}

// generate writes ext4-<gib>.z.
func generate(gib int) error {
	dir, err := os.MkdirTemp("", "scratch")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	path := filepath.Join(dir, "disk")
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := f.Truncate(int64(gib) << 30); err != nil {
		return err
	}
	cmd := exec.Command("mke2fs", append(options, path)...)
	cmd.Env = append(os.Environ(), "E2FSPROGS_FAKE_TIME=1")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("mke2fs: %w: %s", err, out)
	}
	var b bytes.Buffer
	z, err := zlib.NewWriterLevel(&b, zlib.BestCompression)
	if err != nil {
		return err
	}
	if err := copyData(z, f); err != nil {
		return err
	}
	if err := z.Close(); err != nil {
		return err
	}
	return os.WriteFile(fmt.Sprintf("ext4-%d.z", gib), b.Bytes(), 0o644)
}

// copyData writes a record for each run of blocks of f that are not zero.
func copyData(z *zlib.Writer, f *os.File) error {
	for off := int64(0); ; {
		start, err := unix.Seek(int(f.Fd()), off, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			return nil
		} else if err != nil {
			return err
		}
		if off, err = unix.Seek(int(f.Fd()), start, unix.SEEK_HOLE); err != nil {
			return err
		}
		b := make([]byte, off-start)
		if _, err := f.ReadAt(b, start); err != nil {
			return err
		}
		if err := copyBlocks(z, b, start); err != nil {
			return err
		}
	}
}

// copyBlocks writes a record for each run of blocks of b that are not zero.
func copyBlocks(z *zlib.Writer, b []byte, at int64) error {
	zero := make([]byte, blockSize)
	for i := 0; i < len(b); {
		n := 0
		for i+n < len(b) && !bytes.Equal(b[i+n:i+n+blockSize], zero) {
			n += blockSize
		}
		if n == 0 {
			i += blockSize
			continue
		}
		head := binary.LittleEndian.AppendUint64(nil, uint64(at)+uint64(i))
		head = binary.LittleEndian.AppendUint32(head, uint32(n))
		if _, err := z.Write(append(head, b[i:i+n]...)); err != nil {
			return err
		}
		i += n
	}
	return nil
}
