package store

import (
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

// Behind the index of a blob lie checksums of its NAR: a CRC-32C, four bytes
// little endian, of each sumChunk bytes. Whatever is read of a blob is compared
// with them, so that a bit that a disk has turned reaches neither a build nor a
// client. They protect from accidents: who can write to the store's folder can
// write checksums as well. Blobs of an earlier nbd have none.

// sumChunk is how many bytes one checksum is of. More would cost those who read
// little, less would cost memory.
const sumChunk = 16 << 10

// sumsLen is the length of the checksums of a NAR.
func sumsLen(size int64) int64 { return (size + sumChunk - 1) / sumChunk * 4 }

// A summer makes the checksums of what is written to it.
type summer struct {
	done []byte
	crc  uint32 // of the chunk that is not full
	have int    // bytes of it
}

// add takes the next bytes.
func (s *summer) add(p []byte) {
	for len(p) > 0 {
		n := min(len(p), sumChunk-s.have)
		s.crc = crc32.Update(s.crc, castagnoli, p[:n])
		s.have += n
		p = p[n:]
		if s.have == sumChunk {
			s.endChunk()
		}
	}
}

func (s *summer) endChunk() {
	s.done = binary.LittleEndian.AppendUint32(s.done, s.crc)
	s.crc, s.have = 0, 0
}

// finish returns the checksums of all bytes.
func (s *summer) finish() []byte {
	if s.have > 0 {
		s.endChunk()
	}
	return s.done
}

// checksums returns those of the blob. They are shared: nobody changes them.
func (b *Blob) checksums() ([]byte, error) {
	if kept := b.sums.Load(); kept != nil {
		return *kept, nil
	}
	sums := make([]byte, sumsLen(b.at.size))
	if _, err := b.f.ReadAt(sums, b.at.offset+b.at.size+b.at.indexLen); err != nil {
		return nil, fmt.Errorf("read checksums of blob %s: %w", b.sum, err)
	}
	if crc32.Checksum(sums, castagnoli) != b.at.sumsCRC {
		return nil, fmt.Errorf("checksums of blob %s: %w", b.sum, ErrDamaged)
	}
	b.sums.Store(&sums)
	return sums, nil
}

// chunkEdges holds what is read before and behind what was asked for.
var chunkEdges = sync.Pool{New: func() any { return new([2 * sumChunk]byte) }}

// readChecked fills p from off, which lies within the NAR, and compares the
// chunks that it lies in with their checksums.
func (b *Blob) readChecked(p []byte, off int64) (int, error) {
	sums, err := b.checksums()
	if err != nil {
		return 0, err
	}
	edges := chunkEdges.Get().(*[2 * sumChunk]byte)
	defer chunkEdges.Put(edges)
	from, end := off/sumChunk*sumChunk, off+int64(len(p))
	to := min((end+sumChunk-1)/sumChunk*sumChunk, b.at.size)
	pieces := [][]byte{edges[:off-from], p, edges[sumChunk:][:to-end]}
	if err := readPieces(b.f, pieces, b.at.offset+from); err != nil {
		return 0, err
	}
	if b.inject != nil {
		if err := b.inject(p); err != nil {
			return 0, err
		}
	}
	if !chunksMatch(pieces, sums[from/sumChunk*4:]) {
		return 0, fmt.Errorf("%w: other bytes at %d than were stored", ErrDamaged, off)
	}
	return len(p), nil
}

// chunksMatch compares pieces, which begin a chunk and end one, with checksums.
func chunksMatch(pieces [][]byte, sums []byte) bool {
	var s summer
	s.done = make([]byte, 0, 64)
	for _, p := range pieces {
		s.add(p)
	}
	got := s.finish()
	return string(got) == string(sums[:len(got)])
}

// readPieces fills pieces from off on, with one system call as a rule; too few
// bytes are io.EOF.
func readPieces(f *os.File, pieces [][]byte, off int64) error {
	n, err := unix.Preadv(int(f.Fd()), pieces, off)
	if err != nil {
		n = 0 // the rest tells the error again, unless it has gone
	}
	for _, p := range pieces {
		if n < len(p) {
			if _, err := f.ReadAt(p[n:], off+int64(n)); err != nil {
				return err
			}
		}
		off += int64(len(p))
		n = max(0, n-len(p))
	}
	return nil
}
