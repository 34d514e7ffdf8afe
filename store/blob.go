package store

import (
	"container/list"
	"context"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"

	"nbd/nixproto"
	"nbd/nixproto/nar"
)

// A Blob is a stored NAR, open for reading by several goroutines. It stays
// readable until Close, whatever is deleted or collected.
type Blob struct {
	sum     sum
	at      blobRecord
	f       *os.File // the file, or that of the segment
	segment *segment // nil for a file
	store   *Store
	sums    atomic.Pointer[[]byte] // see checksums
	inject  func([]byte) error     // see Inject
}

// Inject has f see, and perhaps change, whatever is read from now on, before it
// is compared with the checksums. It is for trying out what damage does, and
// called before the first read.
func (b *Blob) Inject(f func(read []byte) error) { b.inject = f }

// ReadAt implements io.ReaderAt over the NAR. Bytes that are not those that were
// stored are ErrDamaged.
func (b *Blob) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 {
		return 0, errors.New("read blob: negative offset")
	}
	if off >= b.at.size {
		return 0, io.EOF
	}
	short := int64(len(p)) > b.at.size-off
	if short {
		p = p[:b.at.size-off]
	}
	n, err := b.read(p, off)
	switch {
	case err == io.EOF: // the NAR does not end here
		err = fmt.Errorf("read blob %s: %w: ends early", b.sum, ErrDamaged)
	case err != nil:
		err = fmt.Errorf("read blob %s: %w", b.sum, err)
	case short:
		err = io.EOF
	}
	return n, err
}

// read fills p from off, both within the NAR.
func (b *Blob) read(p []byte, off int64) (int, error) {
	if b.at.summed {
		return b.readChecked(p, off)
	}
	return b.f.ReadAt(p, b.at.offset+off)
}

// WriteTo writes the whole NAR to w. It implements io.WriterTo.
func (b *Blob) WriteTo(w io.Writer) (int64, error) {
	return io.CopyBuffer(struct{ io.Writer }{w}, io.NewSectionReader(b, 0, b.at.size), make([]byte, min(b.at.size+1, 512<<10)))
}

// Size returns the length of the NAR in bytes.
func (b *Blob) Size() int64 { return b.at.size }

// Index returns what is in the NAR. It is shared: the caller does not change it.
func (b *Blob) Index() (nar.Index, error) {
	if x, ok := b.store.indexes.get(b.sum); ok {
		return x, nil
	}
	x, err := b.readIndex()
	if err != nil {
		return nil, err
	}
	b.store.indexes.put(b.sum, x)
	return x, nil
}

// readIndex reads the index from disk.
func (b *Blob) readIndex() (nar.Index, error) {
	buf := make([]byte, b.at.indexLen)
	if _, err := b.f.ReadAt(buf, b.at.offset+b.at.size); err != nil {
		return nil, fmt.Errorf("read index of blob %s: %w", b.sum, err)
	}
	if crc32.Checksum(buf, castagnoli) != b.at.indexCRC {
		return nil, fmt.Errorf("index of blob %s: %w", b.sum, ErrDamaged)
	}
	x, err := nar.DecodeIndex(buf)
	if err != nil {
		return nil, fmt.Errorf("index of blob %s: %w: %w", b.sum, ErrDamaged, err)
	}
	if x.NARSize() != b.at.size {
		return nil, fmt.Errorf("index of blob %s: %w: for a NAR of another size", b.sum, ErrDamaged)
	}
	return x, nil
}

// Close gives up the blob.
func (b *Blob) Close() error {
	if b.segment != nil {
		return b.store.segs.release(b.segment)
	}
	return b.f.Close()
}

// OpenBlob opens the NAR with that hash, or returns ErrNotFound. Below views,
// content is named by hash: the caller has seen to it that the account may
// have it. A blob whose bytes are not all there is ErrDamaged.
func (s *Store) OpenBlob(ctx context.Context, narHash nixproto.Hash) (*Blob, error) {
	h, err := sumOf(narHash)
	if err != nil {
		return nil, err
	}
	s.pins.pin(h)
	defer s.pins.unpin(h)
	return s.openPinned(h)
}

// openPinned opens a blob that is pinned, or returns ErrNotFound.
func (s *Store) openPinned(h sum) (*Blob, error) {
	at, ok, err := s.lookupBlob(h)
	for {
		if err != nil {
			return nil, err
		}
		if !ok {
			return nil, fmt.Errorf("blob %s: %w", h, ErrNotFound)
		}
		b, openErr := s.openBlob(h, at)
		if openErr == nil {
			return b, nil
		}
		// Compaction may have moved it meanwhile.
		var now blobRecord
		if now, ok, err = s.lookupBlob(h); err == nil && ok && now == at {
			return nil, openErr
		}
		at = now
	}
}

// openBlob opens the blob at a place.
func (s *Store) openBlob(h sum, at blobRecord) (*Blob, error) {
	b := &Blob{sum: h, at: at, store: s}
	var err error
	if at.segment != 0 {
		if b.segment, err = s.segs.acquire(at.segment); err == nil {
			b.f = b.segment.f
		}
	} else {
		b.f, err = os.Open(s.blobPath(h))
	}
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("open blob %s: %w: its file is missing", h, ErrDamaged)
	}
	if err != nil {
		return nil, fmt.Errorf("open blob %s: %w", h, err)
	}
	if err := b.checkLength(); err != nil {
		return nil, errors.Join(err, b.Close())
	}
	return b, nil
}

// checkLength reports whether all bytes of the blob can be there.
func (b *Blob) checkLength() error {
	fi, err := b.f.Stat()
	if err != nil {
		return fmt.Errorf("open blob %s: %w", b.sum, err)
	}
	end := b.at.offset + b.at.stored()
	if fi.Size() < end || b.segment == nil && fi.Size() != end {
		return fmt.Errorf("open blob %s: %w: its file has %d bytes of %d", b.sum, ErrDamaged, fi.Size(), end)
	}
	return nil
}

// HasBlob reports whether the NAR with that hash is stored.
func (s *Store) HasBlob(ctx context.Context, narHash nixproto.Hash) (bool, error) {
	h, err := sumOf(narHash)
	if err != nil {
		return false, err
	}
	_, ok, err := s.lookupBlob(h)
	return ok, err
}

// blobPath returns the file of a blob that has one.
func (s *Store) blobPath(h sum) string {
	name := h.String()
	return filepath.Join(s.dir, "blobs", name[:2], name)
}

// maxCached is how many entries the cached indexes have together; an entry
// takes about 100 bytes.
const maxCached = 200_000

// An indexCache keeps the indexes used last.
type indexCache struct {
	mu      sync.Mutex
	entries map[sum]*list.Element // of *cachedIndex
	order   list.List             // the one used last is in front
	total   int
}

type cachedIndex struct {
	sum   sum
	index nar.Index
}

func (c *indexCache) get(h sum) (nar.Index, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	e := c.entries[h]
	if e == nil {
		return nil, false
	}
	c.order.MoveToFront(e)
	return e.Value.(*cachedIndex).index, true
}

func (c *indexCache) put(h sum, x nar.Index) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.entries[h] != nil {
		return
	}
	if c.entries == nil {
		c.entries = make(map[sum]*list.Element)
	}
	c.entries[h] = c.order.PushFront(&cachedIndex{h, x})
	c.total += len(x)
	for c.total > maxCached && c.order.Len() > 1 {
		old := c.order.Remove(c.order.Back()).(*cachedIndex)
		delete(c.entries, old.sum)
		c.total -= len(old.index)
	}
}
