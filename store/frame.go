package store

import (
	"encoding/binary"
	"fmt"
	"hash/crc32"
)

// A segment is a sequence of frames, each on a multiple of eight bytes:
//
//	0   4  "nbdS"
//	4   4  kind
//	8   8  length of the payload
//	16  4  CRC-32C of the payload of a commit; 0 for a NAR, whose hash is known
//	20  4  CRC-32C of the bytes before
//	24     payload, then zeros up to a multiple of eight bytes
//
// All numbers are little endian. The payload of a NAR frame is a NAR and, right
// behind it, its index. That of a commit frame is a batch: the records of paths
// that became valid together, and where their blobs are. A NAR frame that no
// commit names is of no use.

// The kinds of frames.
const (
	frameNAR    = 1
	frameCommit = 2
)

const (
	frameMagic = 0x5364626e // "nbdS"
	frameHead  = 24
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// A frame is the head of one, and where it lies.
type frame struct {
	kind   uint32
	length int64 // of the payload
	crc    uint32
}

// size returns how many bytes the frame takes.
func (f *frame) size() int64 { return frameHead + padded(f.length) }

// padded returns n, rounded up to a multiple of eight.
func padded(n int64) int64 { return (n + 7) &^ 7 }

// put writes the head of f to b.
func (f *frame) put(b []byte) {
	binary.LittleEndian.PutUint32(b, frameMagic)
	binary.LittleEndian.PutUint32(b[4:], f.kind)
	binary.LittleEndian.PutUint64(b[8:], uint64(f.length))
	binary.LittleEndian.PutUint32(b[16:], f.crc)
	binary.LittleEndian.PutUint32(b[20:], crc32.Checksum(b[:20], castagnoli))
}

// parseFrame reads the head of a frame that has at most room bytes, itself
// included.
func parseFrame(b []byte, room int64) (f frame, ok bool) {
	if len(b) < frameHead || binary.LittleEndian.Uint32(b) != frameMagic ||
		binary.LittleEndian.Uint32(b[20:]) != crc32.Checksum(b[:20], castagnoli) {
		return f, false
	}
	f.kind = binary.LittleEndian.Uint32(b[4:])
	length := binary.LittleEndian.Uint64(b[8:])
	f.crc = binary.LittleEndian.Uint32(b[16:])
	if room < frameHead || length > uint64(room-frameHead) {
		return f, false
	}
	f.length = int64(length)
	return f, (f.kind == frameNAR || f.kind == frameCommit) && f.size() <= room
}

// A batch is what a commit changes: blobs and records to be written over
// whatever is there.
type batch struct {
	blobs []batchBlob
	paths []batchPath
	// replaced are the accounts of which a path that was valid gets other
	// content. It is not encoded: whoever writes the records sees it.
	replaced []AccountID
}

type batchBlob struct {
	sum sum
	at  blobRecord
}

type batchPath struct {
	account AccountID
	rec     *record
}

// batchVersion is the first byte of an encoded batch.
const batchVersion = 1

// appendBatch appends the encoding of x to b: version, number of blobs, for
// each its hash and record; number of paths, for each the account, the base
// name and the record. Records are strings.
func appendBatch(b []byte, x *batch) ([]byte, error) {
	b = append(b, batchVersion)
	b = binary.AppendUvarint(b, uint64(len(x.blobs)))
	var rec []byte
	for i := range x.blobs {
		rec = appendBlobRecord(rec[:0], &x.blobs[i].at)
		b = append(b, x.blobs[i].sum[:]...)
		b = appendString(b, string(rec))
	}
	b = binary.AppendUvarint(b, uint64(len(x.paths)))
	for _, p := range x.paths {
		var err error
		if rec, err = appendRecord(rec[:0], p.rec); err != nil {
			return nil, err
		}
		b = binary.AppendUvarint(b, uint64(p.account))
		b = appendString(b, p.rec.Path.Base())
		b = appendString(b, string(rec))
	}
	return b, nil
}

// decodeBatch decodes what appendBatch made.
func decodeBatch(b []byte) (*batch, error) {
	d := decoder{b: string(b)}
	if v := d.byte(); v != batchVersion {
		return nil, fmt.Errorf("commit: %w: version %d", ErrDamaged, v)
	}
	x := &batch{}
	for range d.count() {
		blob := batchBlob{sum: d.sum()}
		at, err := decodeBlobRecord([]byte(d.string()))
		if err != nil || d.err != nil {
			return nil, fmt.Errorf("commit: %w", firstError(d.err, err))
		}
		blob.at = at
		x.blobs = append(x.blobs, blob)
	}
	for range d.count() {
		p := batchPath{account: AccountID(d.uvarint())}
		path := d.path()
		rec, err := decodeRecord(path, []byte(d.string()))
		if err != nil || d.err != nil {
			return nil, fmt.Errorf("commit: %w", firstError(d.err, err))
		}
		p.rec = rec
		x.paths = append(x.paths, p)
	}
	if err := d.end(); err != nil {
		return nil, fmt.Errorf("commit: %w", err)
	}
	return x, nil
}

// firstError returns the first of errs that is not nil.
func firstError(errs ...error) error {
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
}

// commitFrame returns the frame of a commit that makes x.
func commitFrame(x *batch) ([]byte, error) {
	b, err := appendBatch(make([]byte, frameHead, 64+256*(len(x.paths)+len(x.blobs))), x)
	if err != nil {
		return nil, err
	}
	payload := b[frameHead:]
	f := frame{kind: frameCommit, length: int64(len(payload)), crc: crc32.Checksum(payload, castagnoli)}
	f.put(b)
	return append(b, make([]byte, f.size()-int64(len(b)))...), nil
}
