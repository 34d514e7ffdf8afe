package vm

import (
	"bytes"
	"compress/zlib"
	"embed"
	"encoding/binary"
	"fmt"
	"io"
	"math/bits"
	"os"
)

// A scratch disk is a sparse file that holds an empty ext4 file system, made
// from a template so that no tool is needed on the host. There is a template
// for each power of two of GiB; scratch/generate.go tells how they were made.
// The file takes some 100 KiB of the host's disk until the guest writes.
//
//go:generate sh -c "cd scratch && go run generate.go"
//go:embed scratch/*.z
var scratchTemplates embed.FS

// MaxScratchMiB is the size of the largest scratch disk.
const MaxScratchMiB = 1 << 20

// ScratchSize returns the size in bytes of the scratch disk of a build that wants
// sizeMiB: that, rounded up to a power of two of GiB, at least 1 GiB. The
// guest can fill no more than that, some 1.6 % less for the file system's own
// tables.
func ScratchSize(sizeMiB int) (int64, error) {
	gib, err := scratchGiB(sizeMiB)
	return int64(gib) << 30, err
}

// scratchGiB returns that size in GiB, which is the name of its template.
func scratchGiB(sizeMiB int) (int, error) {
	if sizeMiB <= 0 || sizeMiB > MaxScratchMiB {
		return 0, fmt.Errorf("scratch disk of %d MiB: must be 1 to %d", sizeMiB, MaxScratchMiB)
	}
	gib := (sizeMiB + 1023) / 1024
	return 1 << bits.Len(uint(gib-1)), nil
}

// writeScratch makes an empty file a scratch disk of so many GiB, a power of two.
func writeScratch(f *os.File, gib int) error {
	template, err := scratchTemplates.ReadFile(fmt.Sprintf("scratch/ext4-%d.z", gib))
	if err == nil {
		err = writeTemplate(f, template, int64(gib)<<30)
	}
	if err != nil {
		return fmt.Errorf("create scratch disk: %w", err)
	}
	return nil
}

// writeTemplate writes a template's records to f and makes it size bytes long.
func writeTemplate(f *os.File, template []byte, size int64) error {
	z, err := zlib.NewReader(bytes.NewReader(template))
	if err != nil {
		return err
	}
	b, err := io.ReadAll(z)
	if err != nil {
		return err
	}
	for len(b) > 0 {
		if len(b) < 12 {
			return io.ErrUnexpectedEOF
		}
		off, n := int64(binary.LittleEndian.Uint64(b)), int(binary.LittleEndian.Uint32(b[8:]))
		if b = b[12:]; n > len(b) {
			return io.ErrUnexpectedEOF
		}
		if _, err := f.WriteAt(b[:n], off); err != nil {
			return err
		}
		b = b[n:]
	}
	return f.Truncate(size)
}
