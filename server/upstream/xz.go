package upstream

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"github.com/ulikunitz/xz/lzma"
)

// An xzReader decodes a file in the .xz format 1.2 (tukaani.org/xz): streams of
// blocks of LZMA2 chunks. It is here because the library's own reader allocates
// whatever dictionary a block's header asks for, up to 4 GiB. Check values are
// passed over: what is read is compared with the hash of the NAR.
//
//	stream header, block …, index, stream footer, padding; then another stream
type xzReader struct {
	r     *countingReader
	check int64     // bytes of the check behind each block
	block io.Reader // nil between blocks
	begun bool      // within a stream
	start int64     // of the block's data
	any   bool      // there was a stream
	size  int       // of what comes out, at most
	// budget is what dictionaries may take in all, in bytes: many small blocks
	// with large ones would cost much time. It grows with what comes out.
	budget int64
	err    error // sticky
}

// newXZReader returns a reader of a file that yields at most size bytes: no
// dictionary needs to be larger than that.
func newXZReader(r *bufio.Reader, size int64) *xzReader {
	return &xzReader{r: &countingReader{r: r}, size: int(min(size, maxWindow)), budget: 16 * maxWindow}
}

// A countingReader knows how far it has read. It has ReadByte, so that nobody
// buffers what it reads.
type countingReader struct {
	r *bufio.Reader
	n int64
}

func (c *countingReader) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	c.n += int64(n)
	return n, err
}

func (c *countingReader) ReadByte() (byte, error) {
	b, err := c.r.ReadByte()
	if err == nil {
		c.n++
	}
	return b, err
}

// Read implements io.Reader.
func (x *xzReader) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	for x.err == nil {
		if x.block == nil {
			x.err = x.next()
			continue
		}
		n, err := x.block.Read(p)
		x.budget += 4 * int64(n)
		if err == io.EOF {
			x.block, err = nil, x.endBlock()
		}
		x.err = wrapXZ(err)
		if n > 0 {
			return n, nil
		}
	}
	return 0, x.err
}

func wrapXZ(err error) error {
	if err == nil || errors.Is(err, ErrMalformed) || errors.Is(err, errUnreachable) {
		return err
	}
	if err == io.EOF {
		err = io.ErrUnexpectedEOF
	}
	return malformed("xz", err)
}

// next goes on to the next block; io.EOF at the end of the file.
func (x *xzReader) next() error {
	if !x.begun {
		if err := x.beginStream(); err != nil {
			return err
		}
	}
	size, err := x.r.ReadByte()
	if err != nil {
		return wrapXZ(err)
	}
	if size == 0 {
		x.begun = false
		return wrapXZ(x.endStream())
	}
	return wrapXZ(x.beginBlock(size))
}

var xzMagic = []byte{0xfd, '7', 'z', 'X', 'Z', 0}

// beginStream reads padding and a stream's header; io.EOF if there is none.
func (x *xzReader) beginStream() error {
	var head [12]byte
	for {
		_, err := io.ReadFull(x.r, head[:4])
		if err == io.EOF && x.any {
			return io.EOF
		}
		if err != nil {
			return wrapXZ(err)
		}
		if !x.any || head[0] != 0 {
			break
		}
		if head != [12]byte{} {
			return wrapXZ(errors.New("padding is not zero"))
		}
	}
	if _, err := io.ReadFull(x.r, head[4:]); err != nil {
		return wrapXZ(err)
	}
	if !bytes.Equal(head[:6], xzMagic) || head[6] != 0 || head[7] > 15 {
		return wrapXZ(errors.New("not the header of a stream"))
	}
	x.check = [...]int64{0, 4, 4, 4, 8, 8, 8, 16, 16, 16, 32, 32, 32, 64, 64, 64}[head[7]]
	x.begun, x.any = true, true
	return nil
}

// beginBlock reads a block's header, whose first byte is size.
func (x *xzReader) beginBlock(size byte) error {
	head := make([]byte, 4*int(size)+4-1)
	if _, err := io.ReadFull(x.r, head); err != nil {
		return err
	}
	head = head[:len(head)-4] // without its CRC
	dictionary, err := parseBlockHeader(head)
	if err != nil {
		return err
	}
	dictionary = max(min(dictionary, x.size), lzma.MinDictCap)
	if x.budget -= int64(dictionary); x.budget < 0 {
		return errors.New("many small blocks with large dictionaries")
	}
	x.start = x.r.n
	x.block, err = lzma.Reader2Config{DictCap: dictionary}.NewReader2(x.r)
	return err
}

// parseBlockHeader returns the size of the dictionary.
func parseBlockHeader(head []byte) (int, error) {
	short := errors.New("header of a block ends early")
	if len(head) == 0 {
		return 0, short
	}
	flags, rest := head[0], head[1:]
	if flags&0x3f != 0 {
		return 0, errors.New("a block has filters other than LZMA2")
	}
	for _, present := range [...]byte{0x40, 0x80} { // its sizes
		if flags&present == 0 {
			continue
		}
		_, n := binary.Uvarint(rest)
		if n <= 0 {
			return 0, short
		}
		rest = rest[n:]
	}
	if len(rest) < 3 {
		return 0, short
	}
	if rest[0] != 0x21 || rest[1] != 1 {
		return 0, errors.New("a block has filters other than LZMA2")
	}
	dictionary, err := lzma.DecodeDictCap(rest[2])
	if err != nil {
		return 0, err
	}
	if dictionary > maxWindow {
		return 0, fmt.Errorf("its dictionary of %d MiB is larger than %d MiB", dictionary>>20, maxWindow>>20)
	}
	return int(dictionary), nil
}

// endBlock reads a block's padding and check.
func (x *xzReader) endBlock() error {
	rest := (4-(x.r.n-x.start)%4)%4 + x.check
	_, err := io.CopyN(io.Discard, x.r, rest)
	return err
}

// endStream reads the index, whose first byte was read, and the footer.
func (x *xzReader) endStream() error {
	start := x.r.n - 1
	records, err := binary.ReadUvarint(x.r)
	if err != nil {
		return err
	}
	for range records { // each took a block, or the file ends
		for range 2 {
			if _, err := binary.ReadUvarint(x.r); err != nil {
				return err
			}
		}
	}
	rest := (4-(x.r.n-start)%4)%4 + 4 + 12
	_, err = io.CopyN(io.Discard, x.r, rest)
	return err
}
