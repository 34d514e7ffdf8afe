package store

import (
	"bytes"
	"encoding/hex"
	"flag"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"nbd/nixproto"
)

var update = flag.Bool("update", false, "rewrite the golden files")

const (
	pathA = nixproto.StorePath("/nix/store/00000000000000000000000000000000-a")
	pathB = nixproto.StorePath("/nix/store/11111111111111111111111111111111-b.drv")
	pathC = nixproto.StorePath("/nix/store/22222222222222222222222222222222-c-1.0")
)

// testHash returns a hash that is made of b.
func testHash(b byte) nixproto.Hash {
	return nixproto.NewHash(nixproto.SHA256, bytes.Repeat([]byte{b}, 32))
}

// testRecords are records by the name of their golden file.
var testRecords = map[string]*record{
	"minimal": {PathInfo: nixproto.PathInfo{Path: pathA, NarHash: testHash(1), NarSize: 112}},
	"full": {
		PathInfo: nixproto.PathInfo{
			Path: pathA, Deriver: pathB, NarHash: testHash(2), NarSize: 1 << 40,
			References: []nixproto.StorePath{pathA, pathC}, RegistrationTime: 1700000000,
			Ultimate: true, Signatures: []string{"cache.example.org-1:AAAA", "nbd/alice-1:BBBB"},
			CA: "fixed:r:sha256:0000000000000000000000000000000000000000000000000000",
		},
		closure: sum{7}, epoch: 3,
	},
	"derivation": {
		PathInfo: nixproto.PathInfo{Path: pathB, NarHash: testHash(3), NarSize: 800, References: []nixproto.StorePath{pathC}},
		outputs:  []string{pathA.Base(), pathC.Base()},
	},
}

var testBlobs = map[string]blobRecord{
	"file":    {size: 1 << 33, indexLen: 70, indexCRC: 0xdeadbeef},
	"segment": {segment: 300, offset: 24, size: 112, indexLen: 5, indexCRC: 1},
	"summed":  {segment: 300, offset: 24, size: 112, indexLen: 5, indexCRC: 1, summed: true, sumsCRC: 2},
}

// testBatch is a batch with all of the above.
func testBatch() *batch {
	return &batch{
		blobs: []batchBlob{{sum{1}, testBlobs["file"]}, {sum{2}, testBlobs["segment"]}},
		paths: []batchPath{{1, testRecords["minimal"]}, {500, testRecords["full"]}},
	}
}

// equal compares what the tests decode.
var equal = cmp.Options{
	cmp.AllowUnexported(record{}, batch{}, batchBlob{}, batchPath{}, blobRecord{}),
	cmp.Comparer(func(a, b nixproto.Hash) bool { return a == b }),
	cmpopts.EquateEmpty(),
}

// golden compares got with a file of hexadecimal digits.
func golden(t *testing.T, name string, got []byte) {
	t.Helper()
	file := filepath.Join("testdata", name+".hex")
	text := hex.Dump(got)
	if *update {
		if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(strings.Split(string(want), "\n"), strings.Split(text, "\n")); diff != "" {
		t.Errorf("%s: %s", name, diff)
	}
}

func TestRecordGolden(t *testing.T) {
	for name, r := range testRecords {
		b, err := appendRecord(nil, r)
		if err != nil {
			t.Fatal(err)
		}
		golden(t, "record-"+name, b)
		got, err := decodeRecord(r.Path, b)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(r, got, equal); diff != "" {
			t.Errorf("%s: %s", name, diff)
		}
		var refs []nixproto.StorePath
		err = eachReference(b, func(base []byte) error {
			refs = append(refs, nixproto.StorePath(storePrefix+string(base)))
			return nil
		})
		if diff := cmp.Diff(r.References, refs, equal); diff != "" || err != nil {
			t.Errorf("%s: references: %s %v", name, diff, err)
		}
	}
}

func TestBlobRecordGolden(t *testing.T) {
	for name, r := range testBlobs {
		b := appendBlobRecord(nil, &r)
		golden(t, "blob-"+name, b)
		got, err := decodeBlobRecord(b)
		if err != nil || got != r {
			t.Errorf("%s: got %+v, %v", name, got, err)
		}
	}
}

func TestCommitGolden(t *testing.T) {
	b, err := commitFrame(testBatch())
	if err != nil {
		t.Fatal(err)
	}
	golden(t, "commit", b)
	f, ok := parseFrame(b, int64(len(b)))
	if !ok || f.kind != frameCommit || f.size() != int64(len(b)) {
		t.Fatalf("frame %+v, %v", f, ok)
	}
	got, err := decodeBatch(b[frameHead:][:f.length])
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(testBatch(), got, equal); diff != "" {
		t.Error(diff)
	}
}

func TestJSONGolden(t *testing.T) {
	for name, v := range map[string]any{
		"account": &accountRecord{Name: "alice", SigningKey: "s", PublicKey: "p"},
		"key":     &keyRecord{Account: 1, Wire: []byte("wire"), Permissions: []string{}},
		"build":   &Build{ID: 7, Account: 1, DrvPath: pathB, Name: "b", System: "x86_64-linux", Status: StatusBuilt, Outputs: []BuildOutput{{"out", pathA, testHash(1), 112}}, CPUUser: 5},
		"result":  &Result{Build: 7, Account: 1, Outputs: map[string]ResultOutput{"out": {Path: pathA, NarHash: testHash(1), NarSize: 112}}},
	} {
		b, err := encodeJSON(v)
		if err != nil {
			t.Fatal(err)
		}
		golden(t, "json-"+name, b)
	}
}

// FuzzRecord checks that what decodes encodes back alike.
func FuzzRecord(f *testing.F) {
	for _, r := range testRecords {
		b, err := appendRecord(nil, r)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		_ = eachReference(b, func([]byte) error { return nil })
		r, err := decodeRecord(pathA, b)
		if err != nil {
			return
		}
		again, err := appendRecord(nil, r)
		if err != nil || !bytes.Equal(again, b) {
			t.Errorf("encodes as %x, %v", again, err)
		}
	})
}

func FuzzBlobRecord(f *testing.F) {
	for _, r := range testBlobs {
		f.Add(appendBlobRecord(nil, &r))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		r, err := decodeBlobRecord(b)
		if err != nil {
			return
		}
		if again := appendBlobRecord(nil, &r); !bytes.Equal(again, b) {
			t.Errorf("encodes as %x", again)
		}
	})
}

func FuzzBatch(f *testing.F) {
	b, err := appendBatch(nil, testBatch())
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Fuzz(func(t *testing.T, b []byte) {
		x, err := decodeBatch(b)
		if err != nil {
			return
		}
		again, err := appendBatch(nil, x)
		if err != nil || !bytes.Equal(again, b) {
			t.Errorf("encodes as %x, %v", again, err)
		}
	})
}

func FuzzFrame(f *testing.F) {
	b, err := commitFrame(testBatch())
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b[:frameHead], int64(len(b)))
	f.Fuzz(func(t *testing.T, b []byte, room int64) {
		if x, ok := parseFrame(b, room); ok && (x.size() > room || x.length < 0) {
			t.Errorf("frame %+v in %d bytes", x, room)
		}
	})
}
