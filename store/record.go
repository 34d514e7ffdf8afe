package store

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"math"
	"slices"
	"strings"

	"nbd/nixproto"
)

// This file has the values of the buckets "paths" and "blobs". Both begin with
// a version byte. Numbers and lengths are uvarints in their shortest form, a
// string is its length and its bytes, a list its length and its items; a
// decoder takes nothing that the encoder would not have written.

// recordVersion is the first byte of an encoded record.
const recordVersion = 1

// A record is what one view knows of a path. In the database the path itself
// is the key.
type record struct {
	nixproto.PathInfo
	// outputs are the base names of the outputs of a derivation, sorted; they
	// are in the view's index of derivers.
	outputs []string
	// closure is the path's closure hash (nixproto.ClosureHash), which holds as
	// long as the view's epoch is epoch; the zero sum if it is not known.
	// closurehash.go tells why.
	closure sum
	epoch   uint64
}

// sameContent reports whether r and o, of the same path, are of the same
// content.
func (r *record) sameContent(o *record) bool {
	return r.NarHash == o.NarHash && r.NarSize == o.NarSize && r.CA == o.CA && slices.Equal(r.References, o.References)
}

// The bits of a record's second byte.
const (
	recordUltimate = 1 << iota
	recordDeriver
	recordCA
	recordOutputs
	recordClosure
	recordBits = 1<<iota - 1
)

// appendRecord appends the encoding of r to b: version, bits, NAR hash, NAR
// size, registration time, references and signatures, and then, each if its
// bit is set, deriver, content address, outputs, and at last epoch (eight
// bytes, little endian) and closure hash. Paths are written as base names.
func appendRecord(b []byte, r *record) ([]byte, error) {
	h, err := sumOf(r.NarHash)
	if err != nil {
		return nil, err
	}
	var bits byte
	set := func(bit byte, on bool) {
		if on {
			bits |= bit
		}
	}
	set(recordUltimate, r.Ultimate)
	set(recordDeriver, r.Deriver != "")
	set(recordCA, r.CA != "")
	set(recordOutputs, len(r.outputs) > 0)
	set(recordClosure, r.closure != sum{})
	b = append(b, recordVersion, bits)
	b = append(b, h[:]...)
	b = binary.AppendUvarint(b, r.NarSize)
	b = binary.AppendUvarint(b, uint64(max(r.RegistrationTime, 0)))
	b = binary.AppendUvarint(b, uint64(len(r.References)))
	for _, p := range r.References {
		b = appendString(b, p.Base())
	}
	b = appendStrings(b, r.Signatures)
	if r.Deriver != "" {
		b = appendString(b, r.Deriver.Base())
	}
	if r.CA != "" {
		b = appendString(b, r.CA)
	}
	if len(r.outputs) > 0 {
		b = appendStrings(b, r.outputs)
	}
	if r.closure != (sum{}) {
		b = binary.LittleEndian.AppendUint64(b, r.epoch)
		b = append(b, r.closure[:]...)
	}
	return b, nil
}

// decodeRecord decodes the record of path p. It keeps no reference to b.
func decodeRecord(p nixproto.StorePath, b []byte) (*record, error) {
	d := decoder{b: string(b)}
	if v := d.byte(); v != recordVersion {
		return nil, fmt.Errorf("record of %s: %w: version %d", p, ErrDamaged, v)
	}
	bits := d.byte()
	if bits&^recordBits != 0 {
		d.fail("unknown bits")
	}
	r := &record{}
	r.Path = p
	r.Ultimate = bits&recordUltimate != 0
	h := d.sum()
	r.NarHash = h.hash()
	r.NarSize = d.uvarint()
	if r.NarSize > math.MaxInt64 {
		d.fail("NAR size")
	}
	t := d.uvarint()
	if t > math.MaxInt64 {
		d.fail("registration time")
	}
	r.RegistrationTime = int64(t)
	r.References = d.paths()
	r.Signatures = d.strings()
	if bits&recordDeriver != 0 {
		r.Deriver = d.path()
	}
	if bits&recordCA != 0 {
		r.CA = d.nonempty()
	}
	if bits&recordOutputs != 0 {
		if r.outputs = d.strings(); len(r.outputs) == 0 {
			d.fail("no outputs")
		}
	}
	if bits&recordClosure != 0 {
		r.epoch = d.uint64()
		if r.closure = d.sum(); r.closure == (sum{}) {
			d.fail("no closure hash")
		}
	}
	if err := d.end(); err != nil {
		return nil, fmt.Errorf("record of %s: %w", p, err)
	}
	return r, nil
}

// recordSum returns the NAR hash in an encoded record, without decoding the
// rest.
func recordSum(b []byte) (h sum, err error) {
	if len(b) < 2+len(h) || b[0] != recordVersion {
		return h, fmt.Errorf("record: %w", ErrDamaged)
	}
	return sum(b[2:][:len(h)]), nil
}

// recordClosureHash returns the closure hash in an encoded record, the zero sum
// if it has none for that epoch, without decoding the rest.
func recordClosureHash(b []byte, epoch uint64) (h sum) {
	n := len(b) - len(h)
	if len(b) < 2+8+len(h) || b[1]&recordClosure == 0 || binary.LittleEndian.Uint64(b[n-8:]) != epoch {
		return h
	}
	return sum(b[n:])
}

// eachReference calls f with the base names of the references in an encoded
// record, without decoding the rest. They are valid until f returns.
func eachReference(b []byte, f func(base []byte) error) error {
	if _, err := recordSum(b); err != nil {
		return err
	}
	b = b[2+len(sum{}):]
	next := func() uint64 {
		n, size := binary.Uvarint(b)
		b = b[max(size, 0):]
		return n
	}
	next() // NAR size
	next() // registration time
	for range min(next(), uint64(len(b))) {
		n := next()
		if n > uint64(len(b)) {
			return fmt.Errorf("record: %w", ErrDamaged)
		}
		if err := f(b[:n]); err != nil {
			return err
		}
		b = b[n:]
	}
	return nil
}

// A blobRecord says where a NAR is.
type blobRecord struct {
	segment  uint64 // 0 for a file of its own
	offset   int64  // of the NAR in the segment
	size     int64  // of the NAR
	indexLen int64  // of the index, which lies right behind the NAR
	indexCRC uint32 // CRC-32C of the index
	// summed says that checksums of the NAR follow the index (sums.go), and
	// sumsCRC is the CRC-32C of those.
	summed  bool
	sumsCRC uint32
}

// stored returns the length of what is stored for the blob.
func (r *blobRecord) stored() int64 {
	if r.summed {
		return r.size + r.indexLen + sumsLen(r.size)
	}
	return r.size + r.indexLen
}

// setTail says what lies behind the NAR.
func (r *blobRecord) setTail(index, sums []byte) {
	r.indexLen, r.indexCRC = int64(len(index)), crc32.Checksum(index, castagnoli)
	r.summed, r.sumsCRC = true, crc32.Checksum(sums, castagnoli)
}

// The first byte of an encoded blobRecord tells whether checksums are stored.
const (
	blobVersion       = 1
	blobVersionSummed = 2
)

// appendBlobRecord appends the encoding of r to b: version, segment, offset in
// it if there is one, NAR size, length of the index, and the CRC-32C of the index
// and that of the checksums, if there are any, as four bytes each, little endian.
func appendBlobRecord(b []byte, r *blobRecord) []byte {
	if r.summed {
		b = append(b, blobVersionSummed)
	} else {
		b = append(b, blobVersion)
	}
	b = binary.AppendUvarint(b, r.segment)
	if r.segment != 0 {
		b = binary.AppendUvarint(b, uint64(r.offset))
	}
	b = binary.AppendUvarint(b, uint64(r.size))
	b = binary.AppendUvarint(b, uint64(r.indexLen))
	b = binary.LittleEndian.AppendUint32(b, r.indexCRC)
	if r.summed {
		b = binary.LittleEndian.AppendUint32(b, r.sumsCRC)
	}
	return b
}

// decodeBlobRecord decodes what appendBlobRecord made.
func decodeBlobRecord(b []byte) (r blobRecord, err error) {
	d := decoder{b: string(b)}
	v := d.byte()
	if v != blobVersion && v != blobVersionSummed {
		return r, fmt.Errorf("record of blob: %w: version %d", ErrDamaged, v)
	}
	if r.segment = d.uvarint(); r.segment != 0 {
		r.offset = d.length()
	}
	r.size = d.length()
	r.indexLen = d.length()
	r.indexCRC = d.uint32()
	if r.summed = v == blobVersionSummed; r.summed {
		r.sumsCRC = d.uint32()
	}
	if err := d.end(); err != nil {
		return r, fmt.Errorf("record of blob: %w", err)
	}
	return r, nil
}

func appendString(b []byte, s string) []byte {
	b = binary.AppendUvarint(b, uint64(len(s)))
	return append(b, s...)
}

func appendStrings(b []byte, list []string) []byte {
	b = binary.AppendUvarint(b, uint64(len(list)))
	for _, s := range list {
		b = appendString(b, s)
	}
	return b
}

// A decoder takes fields from the front of b, which it shares memory with. Its
// first error stays, and zero values follow it.
type decoder struct {
	b   string
	err error
}

// errEncoding says that stored bytes are not what an encoder wrote.
var errEncoding = errors.New("bad encoding")

func (d *decoder) fail(what string) {
	if d.err == nil {
		d.err = fmt.Errorf("%w: %w: %s", ErrDamaged, errEncoding, what)
	}
	d.b = ""
}

// end reports the error, or that bytes are left over.
func (d *decoder) end() error {
	if d.err == nil && d.b != "" {
		d.fail("trailing bytes")
	}
	return d.err
}

func (d *decoder) take(n int) string {
	if n > len(d.b) {
		d.fail("ends early")
		return ""
	}
	s := d.b[:n]
	d.b = d.b[n:]
	return s
}

func (d *decoder) byte() byte {
	if s := d.take(1); s != "" {
		return s[0]
	}
	return 0
}

func (d *decoder) uint32() uint32 {
	if s := d.take(4); s != "" {
		return binary.LittleEndian.Uint32([]byte(s))
	}
	return 0
}

func (d *decoder) uint64() uint64 {
	if s := d.take(8); s != "" {
		return binary.LittleEndian.Uint64([]byte(s))
	}
	return 0
}

func (d *decoder) sum() (h sum) {
	copy(h[:], d.take(len(h)))
	return h
}

func (d *decoder) uvarint() uint64 {
	var v uint64
	for i := range min(len(d.b), binary.MaxVarintLen64) {
		c := d.b[i]
		v |= uint64(c&0x7f) << (7 * i)
		if c >= 0x80 {
			continue
		}
		if c == 0 && i > 0 || i == binary.MaxVarintLen64-1 && c > 1 {
			break // longer than needed, or more than 64 bits
		}
		d.b = d.b[i+1:]
		return v
	}
	d.fail("number")
	return 0
}

// length takes a number that may be added to another one.
func (d *decoder) length() int64 {
	n := d.uvarint()
	if n > math.MaxInt64/4 {
		d.fail("length")
		return 0
	}
	return int64(n)
}

func (d *decoder) string() string {
	n := d.uvarint()
	if n > uint64(len(d.b)) {
		d.fail("string ends early")
		return ""
	}
	return d.take(int(n))
}

func (d *decoder) nonempty() string {
	s := d.string()
	if s == "" {
		d.fail("empty string")
	}
	return s
}

// count takes the length of a list whose items take a byte or more each.
func (d *decoder) count() int {
	n := d.uvarint()
	if n > uint64(len(d.b)) {
		d.fail("list ends early")
		return 0
	}
	return int(n)
}

func (d *decoder) strings() []string {
	n := d.count()
	if n == 0 {
		return nil
	}
	list := make([]string, n)
	for i := range list {
		list[i] = d.string()
	}
	return list
}

// base takes the base name of a store path. It makes sure that the methods of
// StorePath work, and leaves it to whoever wrote it that it is well-formed.
func (d *decoder) base() string {
	s := d.string()
	if len(s) < nixproto.HashPartLen+2 || s[nixproto.HashPartLen] != '-' || strings.IndexByte(s, 0) >= 0 {
		d.fail("store path")
		return ""
	}
	return s
}

func (d *decoder) path() nixproto.StorePath {
	if s := d.base(); s != "" {
		return nixproto.StorePath(storePrefix + s)
	}
	return ""
}

const storePrefix = nixproto.StoreDir + "/"

// paths takes a list of base names in increasing order. All paths share one
// string.
func (d *decoder) paths() []nixproto.StorePath {
	n := d.count()
	if n == 0 {
		return nil
	}
	rest := *d
	total := 0
	for range n {
		total += len(storePrefix) + len(rest.base())
	}
	if rest.err != nil {
		*d = rest
		return nil
	}
	var all strings.Builder
	all.Grow(total)
	list := make([]nixproto.StorePath, n)
	for i := range list {
		start := all.Len()
		all.WriteString(storePrefix)
		all.WriteString(d.base())
		list[i] = nixproto.StorePath(all.String()[start:])
		if i > 0 && list[i] <= list[i-1] {
			d.fail("order of paths")
			return nil
		}
	}
	return list
}
