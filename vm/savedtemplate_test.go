package vm

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"
)

// filledTemplate returns a template with something in it.
func filledTemplate(t testing.TB, m machine) *template {
	t.Helper()
	made, err := newTemplate(m.memoryMiB, m.scratchGiB)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(made.release)
	for off, text := range map[int64]string{0: "start", 5 << 20: strings.Repeat("middle", 1000), int64(m.memoryMiB)<<20 - 3: "end"} {
		if _, err := made.ram.WriteAt([]byte(text), off); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := made.state.WriteString("the state of QEMU"); err != nil {
		t.Fatal(err)
	}
	if err := writeScratch(made.disk, m.scratchGiB); err != nil {
		t.Fatal(err)
	}
	return made
}

func contents(t testing.TB, f *os.File) []byte {
	t.Helper()
	info, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	b, err := io.ReadAll(io.NewSectionReader(f, 0, info.Size()))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// diskContents returns what is not empty of a template's disk.
func diskContents(t testing.TB, of *template) []byte {
	t.Helper()
	all, err := partsOf(of.disk, 1<<40)
	if err != nil || len(all) == 0 {
		t.Fatalf("%v, %v", all, err)
	}
	b := fmt.Append(nil, all)
	for _, p := range all {
		part, err := io.ReadAll(io.NewSectionReader(of.disk, p[0], p[1]))
		if err != nil {
			t.Fatal(err)
		}
		b = append(b, part...)
	}
	return b
}

func encoded(t testing.TB, id string, m machine) ([]byte, *template) {
	t.Helper()
	made := filledTemplate(t, m)
	var file bytes.Buffer
	if err := encodeTemplate(&file, id, m, made); err != nil {
		t.Fatal(err)
	}
	return file.Bytes(), made
}

func TestSavedTemplate(t *testing.T) {
	m := sized(2, 64)
	m.onDemand = true
	file, made := encoded(t, "some-id", m)
	if len(file) > 256<<10 {
		t.Errorf("holes were written: %d bytes", len(file))
	}
	read, err := decodeTemplate(bytes.NewReader(file), int64(len(file)), "some-id")
	if err != nil {
		t.Fatal(err)
	}
	defer read.release()
	if !bytes.Equal(contents(t, read.ram), contents(t, made.ram)) || !bytes.Equal(contents(t, read.state), contents(t, made.state)) ||
		!bytes.Equal(diskContents(t, read), diskContents(t, made)) {
		t.Error("what was read is not what was written")
	}
	if read.bytes() > 256<<10 {
		t.Errorf("it takes %d bytes", read.bytes())
	}
	if _, err := read.ram.WriteAt([]byte("x"), 0); err == nil {
		t.Error("it is not sealed")
	}
	h, err := (&savedReader{bytes.NewReader(file), sha256.New()}).readHeader(int64(len(file)))
	p := testPlatform("k")
	m.arch = p.arch
	if err != nil || h.machine(p) != m {
		t.Errorf("%+v, %v", h, err)
	}
}

// No damage goes unnoticed: neither a bit, nor a byte too few or too many.
func TestDamagedTemplate(t *testing.T) {
	file, _ := encoded(t, "some-id", sized(2, 64))
	refused := func(what string, b []byte) {
		t.Helper()
		if got, err := decodeTemplate(bytes.NewReader(b), int64(len(b)), "some-id"); !errors.Is(err, errNotSaved) {
			t.Errorf("%s: %v", what, err)
			if got != nil {
				got.release()
			}
		}
	}
	for i := 0; i < len(file); i += 1 + len(file)/500 {
		b := bytes.Clone(file)
		b[i] ^= 1 << (i % 8)
		refused("bit of byte "+strconv.Itoa(i), b)
	}
	for _, n := range []int{0, 1, len(savedMagic), 100, len(file) / 2, len(file) - 1} {
		refused("the first "+strconv.Itoa(n), file[:n])
	}
	refused("one more", append(bytes.Clone(file), 0))
	if _, err := decodeTemplate(bytes.NewReader(file), int64(len(file)), "another"); !errors.Is(err, errNotSaved) {
		t.Errorf("of another: %v", err)
	}
	// What the file's size belies is not read at all.
	if _, err := decodeTemplate(bytes.NewReader(file), int64(len(file))+1, "some-id"); !errors.Is(err, errNotSaved) {
		t.Errorf("wrong size: %v", err)
	}
}

// Headers that lie, with a right hash, are refused before memory is taken.
func TestLyingTemplate(t *testing.T) {
	good := savedHeader{ID: "i", VCPUs: 1, MemoryMiB: 64, ScratchGiB: 1, State: 1}
	for name, change := range map[string]func(h *savedHeader){
		"no memory":        func(h *savedHeader) { h.MemoryMiB = 0 },
		"too much memory":  func(h *savedHeader) { h.MemoryMiB = 1 << 30 },
		"no disk":          func(h *savedHeader) { h.ScratchGiB = 0 },
		"too large a disk": func(h *savedHeader) { h.ScratchGiB = 1 << 40 },
		"behind the disk":  func(h *savedHeader) { h.Disk = parts{{1 << 30, 1}} },
		"too full a disk":  func(h *savedHeader) { h.Disk = parts{{0, 1 << 29}} },
		"no processor":     func(h *savedHeader) { h.VCPUs = 0 },
		"no state":         func(h *savedHeader) { h.State = 0 },
		"too much state":   func(h *savedHeader) { h.State = 1 << 40 },
		"behind memory":    func(h *savedHeader) { h.Memory = parts{{64 << 20, 1}} },
		"over its end":     func(h *savedHeader) { h.Memory = parts{{1, 64 << 20}} },
		"overflow":         func(h *savedHeader) { h.Memory = parts{{1, 1<<63 - 1}} },
		"before its start": func(h *savedHeader) { h.Memory = parts{{-4096, 4096}} },
		"nothing":          func(h *savedHeader) { h.Memory = parts{{0, 0}} },
		"twice":            func(h *savedHeader) { h.Memory = parts{{0, 4096}, {0, 4096}} },
	} {
		h := good
		change(&h)
		text, err := json.Marshal(&h)
		if err != nil {
			t.Fatal(err)
		}
		file := append(binary.LittleEndian.AppendUint32([]byte(savedMagic), uint32(len(text))), text...)
		if _, err := decodeTemplate(bytes.NewReader(file), h.size(len(text)), "i"); !errors.Is(err, errNotSaved) || errors.Is(err, io.ErrUnexpectedEOF) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func FuzzSavedTemplate(f *testing.F) {
	file, _ := encoded(f, "some-id", sized(2, 8))
	f.Add(file)
	f.Add(file[:200])
	f.Add([]byte(savedMagic + "\xff\xff\xff\xff{}"))
	f.Fuzz(func(t *testing.T, b []byte) {
		got, err := decodeTemplate(bytes.NewReader(b), int64(len(b)), "some-id")
		if err != nil {
			if !errors.Is(err, errNotSaved) {
				t.Error(err)
			}
			return
		}
		defer got.release()
		if !bytes.Equal(b, file) && len(b) == len(file) && bytes.Equal(b[len(b)-sha256.Size:], file[len(file)-sha256.Size:]) {
			t.Error("another file with the same hash")
		}
	})
}

func TestTemplateStore(t *testing.T) {
	m := sized(2, 64)
	s := newSavedTemplates(t.TempDir(), 1<<30)
	if _, err := s.load("a"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("of nothing: %v", err)
	}
	if err := s.remove("a"); err != nil {
		t.Error(err)
	}
	if files, err := s.list(); len(files) != 0 || err != nil {
		t.Errorf("%v, %v", files, err)
	}
	day := func(id string, n int) {
		t.Helper()
		when := time.Unix(1_700_000_000, 0).AddDate(0, 0, n)
		if err := os.Chtimes(s.path(id), when, when); err != nil {
			t.Fatal(err)
		}
	}
	for i, id := range []string{"a", "b", "c"} {
		if err := s.save(id, m, filledTemplate(t, m)); err != nil {
			t.Fatal(err)
		}
		day(id, i)
	}
	read, err := s.load("a") // and so it was used last
	if err != nil {
		t.Fatal(err)
	}
	read.release()
	if h, err := s.header("b"); err != nil || h.ID != "b" || h.MemoryMiB != 64 {
		t.Errorf("%+v, %v", h, err)
	}
	info, err := os.Stat(s.path("a"))
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Fatalf("%v, %v", info.Mode(), err)
	}
	// What is too much goes: the one that was not read for the longest time, and
	// what was never finished.
	unfinished := filepath.Join(s.dir, savedNew+"x")
	if err := os.WriteFile(unfinished, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	day(savedNew+"x", 0)
	s.budget = 3*info.Size() + 10
	if err := s.save("d", m, filledTemplate(t, m)); err != nil {
		t.Fatal(err)
	}
	files, err := s.list()
	if err != nil {
		t.Fatal(err)
	}
	var names string
	for _, f := range files {
		names += f.name
	}
	if names != "dac" && names != "adc" {
		t.Errorf("left: %s", names)
	}
	// What others could have written is not read, nor what is no file.
	if err := os.Chmod(s.path("a"), 0o620); err != nil {
		t.Fatal(err)
	}
	if _, err := s.load("a"); !errors.Is(err, errNotSaved) {
		t.Errorf("writable for a group: %v", err)
	}
	if err := os.Symlink(s.path("c"), s.path("link")); err != nil {
		t.Fatal(err)
	}
	if _, err := s.load("link"); err == nil {
		t.Error("a link was followed")
	}
	if os.Geteuid() == 0 {
		if err := os.Chown(s.path("c"), 12345, 0); err != nil {
			t.Fatal(err)
		}
		if _, err := s.load("c"); !errors.Is(err, errNotSaved) {
			t.Errorf("of another user: %v", err)
		}
	}
}

func TestKeptFrequency(t *testing.T) {
	path := filepath.Join(t.TempDir(), frequencyFile)
	for _, tt := range []struct{ measured, want int }{
		{2_000_000, 2_000_000}, {2_000_100, 2_000_000}, {1_999_800, 2_000_000}, {0, 0},
		{2_000_000, 2_000_000}, {3_000_000, 3_000_000}, {2_000_000, 2_000_000},
	} {
		if got, err := keptFrequency(path, tt.measured); got != tt.want || err != nil {
			t.Errorf("%d: %d, %v; want %d", tt.measured, got, err, tt.want)
		}
	}
	if err := os.WriteFile(path, []byte("damaged"), 0o644); err != nil {
		t.Fatal(err)
	}
	if got, err := keptFrequency(path, 7); got != 7 || err != nil {
		t.Errorf("damaged: %d, %v", got, err)
	}
}
