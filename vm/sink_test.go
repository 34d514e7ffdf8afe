package vm

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"nbd/nixproto/nar"
	"nbd/vm/link"
)

// A testOutput remembers what it was given.
type testOutput struct {
	bytes.Buffer
	closed, aborted int
	writeErr        error
	closeErr        error
}

func (o *testOutput) Write(p []byte) (int, error) {
	if o.closed+o.aborted > 0 {
		return 0, errors.New("written after its end")
	}
	if o.writeErr != nil {
		return 0, o.writeErr
	}
	return o.Buffer.Write(p)
}

func (o *testOutput) Close() error { o.closed++; return o.closeErr }
func (o *testOutput) Abort()       { o.aborted++ }

// testOutputs makes the receivers of a sink, and has them all.
type testOutputs []*testOutput

func (o *testOutputs) create(i int) (OutputWriter, error) {
	if i != len(*o) {
		return nil, fmt.Errorf("output %d after %d", i, len(*o))
	}
	*o = append(*o, new(testOutput))
	return (*o)[i], nil
}

// outputNARs are archives of different lengths, one of a multiple of
// link.OutputAlign.
func outputNARs(t testing.TB) (nars [][]byte, stream []byte) {
	t.Helper()
	// The archive of a file of n bytes has 112 bytes and the padded contents.
	exact := file(bytesOf(2*link.OutputAlign - 112)).archive(t)
	if len(exact)%link.OutputAlign != 0 {
		t.Fatalf("%d bytes, wanted a multiple of %d", len(exact), link.OutputAlign)
	}
	nars = [][]byte{
		file("small").archive(t),
		exact,
		dir(map[string]*tree{"bin": dir(map[string]*tree{"a": program(bytesOf(3 << 20))}), "b": symlink("c")}).archive(t),
		symlink("x").archive(t),
	}
	for _, n := range nars {
		stream = append(stream, n...)
		stream = append(stream, make([]byte, -len(n)&(link.OutputAlign-1))...)
	}
	return nars, stream
}

// checkOutputs compares what was received with archives, all of them complete.
func checkOutputs(t *testing.T, s *Sink, got testOutputs, want [][]byte) {
	t.Helper()
	if err := s.Err(); err != nil {
		t.Errorf("Err = %v", err)
	}
	sizes := s.Sizes()
	if len(got) != len(want) || len(sizes) != len(want) {
		t.Fatalf("%d outputs, %d sizes, want %d", len(got), len(sizes), len(want))
	}
	for i, o := range got {
		if !bytes.Equal(o.Bytes(), want[i]) || sizes[i] != int64(len(want[i])) || o.closed != 1 || o.aborted != 0 {
			t.Errorf("output %d: %d bytes, size %d, closed %d, aborted %d; want %d bytes",
				i, o.Len(), sizes[i], o.closed, o.aborted, len(want[i]))
		}
	}
}

// TestSink writes outputs in pieces of different sizes, as an agent does.
func TestSink(t *testing.T) {
	nars, stream := outputNARs(t)
	for _, block := range []int{512, 4096, 12288, 1 << 20, nbdMaxRequest} {
		t.Run(fmt.Sprint(block), func(t *testing.T) {
			var outs testOutputs
			s := NewSink(SinkConfig{Outputs: len(nars), Limit: int64(len(stream)), Create: outs.create})
			c := connectNBD(t, serveTest(t, s))
			for off := 0; off < len(stream); off += block {
				if err := c.write(stream[off:min(off+block, len(stream))], int64(off)); err != nil {
					t.Fatal(err)
				}
			}
			if err := c.do(nbdCmdFlush, 0, 0, nil, nil); err != nil {
				t.Error(err)
			}
			s.Close()
			checkOutputs(t, s, outs, nars)
		})
	}
}

// TestSinkQEMU writes outputs with QEMU's own client.
func TestSinkQEMU(t *testing.T) {
	qemuIO := tool(t, "qemu-io", "qemu-utils")
	nars, stream := outputNARs(t)
	path := filepath.Join(t.TempDir(), "stream")
	if err := os.WriteFile(path, stream, 0o600); err != nil {
		t.Fatal(err)
	}
	var outs testOutputs
	s := NewSink(SinkConfig{Outputs: len(nars), Limit: 1 << 30, Create: outs.create})
	url := "nbd+unix:///?socket=" + serveTest(t, s)
	out, err := exec.Command(qemuIO, "-f", "raw", "-c", "read -P 0 0 64k", "-c", "discard 0 1M", "-c", "write -z 64M 1M",
		"-c", fmt.Sprintf("write -s %s 0 %d", path, len(stream)), "-c", "flush", "-c", "read -P 0 0 64k", url).CombinedOutput()
	if err != nil {
		t.Errorf("qemu-io: %v\n%s", err, out)
	}
	checkOutputs(t, s, outs, nars)
}

// TestSinkReads says that a sink shows nothing of what it has, and that what is
// no write changes nothing.
func TestSinkReads(t *testing.T) {
	nars, stream := outputNARs(t)
	var outs testOutputs
	s := NewSink(SinkConfig{Outputs: len(nars), Limit: 1 << 30, Create: outs.create})
	c := connectNBD(t, serveTest(t, s))
	if want := uint16(nbdTransHasFlags | nbdTransFlush | nbdTransFUA | nbdTransTrim | nbdTransWriteZeroes); c.flags != want {
		t.Errorf("flags = %#x, want %#x", c.flags, want)
	}
	if err := c.write(stream[:8192], 0); err != nil {
		t.Fatal(err)
	}
	for _, command := range []uint16{nbdCmdFlush, nbdCmdTrim, nbdCmdWriteZeroes} {
		if err := c.do(command, 0, 8192, nil, nil); err != nil {
			t.Errorf("command %d: %v", command, err)
		}
	}
	p := []byte(bytesOf(8192))
	if err := c.read(p, 0); err != nil || !bytes.Equal(p, make([]byte, 8192)) {
		t.Errorf("read: %v, or not zeros", err)
	}
	if err := c.write(stream[8192:], 8192); err != nil {
		t.Fatal(err)
	}
	if err := c.write(nil, 12345); err != nil {
		t.Errorf("write of nothing: %v", err)
	}
	checkOutputs(t, s, outs, nars)
}

// TestSinkRules has guests that break the rules.
func TestSinkRules(t *testing.T) {
	nars, stream := outputNARs(t)
	bent := bytes.Clone(stream)
	bent[len(nars[0])] = 1
	cut := bytes.Clone(stream[:4096])
	cut[40]++
	for name, c := range map[string]struct {
		outputs int
		limit   int64
		data    []byte
		off     int64
		bad     bool // the archive
	}{
		"gap":              {4, 1 << 30, stream, 4096, false},
		"far away":         {4, 1 << 30, stream, DiskSize - 1<<25, false},
		"too long":         {4, int64(len(stream)) - 1, stream, 0, false},
		"no limit":         {4, 0, stream, 0, false},
		"too many":         {3, 1 << 30, stream, 0, false},
		"none expected":    {0, 1 << 30, stream, 0, false},
		"padding not zero": {4, 1 << 30, bent, 0, false},
		"zeros":            {4, 1 << 30, make([]byte, 4096), 0, true},
		"malformed":        {4, 1 << 30, cut, 0, true},
	} {
		t.Run(name, func(t *testing.T) {
			var outs testOutputs
			s := NewSink(SinkConfig{Outputs: c.outputs, Limit: c.limit, Create: outs.create})
			client := connectNBD(t, serveTest(t, s))
			if err := client.write(c.data, c.off); err != errno(nbdEIO) {
				t.Errorf("write: %v", err)
			}
			<-s.Failed()
			first := s.Err()
			var rules *SinkError
			var bad *OutputError
			if errors.As(first, &rules) == c.bad || errors.As(first, &bad) != c.bad {
				t.Errorf("Err = %v (%T)", first, first)
			}
			if err := client.write(stream, 0); err != errno(nbdEIO) {
				t.Errorf("second write: %v", err)
			}
			if s.Err() != first {
				t.Errorf("Err became %v", s.Err())
			}
			for i, o := range outs {
				if o.closed+o.aborted != 1 || (o.closed == 1) != (i < len(s.Sizes())) {
					t.Errorf("output %d: closed %d, aborted %d", i, o.closed, o.aborted)
				}
			}
		})
	}
}

// TestSinkReceiverFails says that errors of receivers come out as they are.
func TestSinkReceiverFails(t *testing.T) {
	full := errors.New("disk full")
	_, stream := outputNARs(t)
	for name, out := range map[string]*testOutput{
		"create": nil,
		"write":  {writeErr: full},
		"close":  {closeErr: full},
	} {
		s := NewSink(SinkConfig{Outputs: 4, Limit: 1 << 30, Create: func(int) (OutputWriter, error) {
			if out == nil {
				return nil, full
			}
			return out, nil
		}})
		if err := s.write(stream, 0); err != full || s.Err() != full {
			t.Errorf("%s: write = %v, Err = %v", name, err, s.Err())
		}
		if out != nil && out.closed+out.aborted != 1 {
			t.Errorf("%s: closed %d, aborted %d", name, out.closed, out.aborted)
		}
	}
}

// TestSinkClose closes a sink in the middle of an archive.
func TestSinkClose(t *testing.T) {
	var outs testOutputs
	s := NewSink(SinkConfig{Outputs: 1, Limit: 1 << 30, Create: outs.create})
	_, stream := outputNARs(t)
	if err := s.write(stream[:50], 0); err != nil {
		t.Fatal(err)
	}
	s.Close()
	s.Close()
	if err := s.write(stream[50:], 50); err == nil {
		t.Error("write after Close")
	}
	if outs[0].aborted != 1 || outs[0].closed != 0 || s.Err() != nil || len(s.Sizes()) != 0 {
		t.Errorf("aborted %d, closed %d, Err %v, Sizes %v", outs[0].aborted, outs[0].closed, s.Err(), s.Sizes())
	}
}

// FuzzSink writes any bytes in any pieces. Whatever happens, each receiver is
// ended once, and has an archive if it was closed.
func FuzzSink(f *testing.F) {
	_, stream := outputNARs(f)
	f.Add(stream[:12288], uint64(1))
	f.Add(file("x").archive(f), uint64(2))
	f.Add(make([]byte, 5000), uint64(3))
	f.Fuzz(func(t *testing.T, b []byte, seed uint64) {
		var outs testOutputs
		s := NewSink(SinkConfig{Outputs: 3, Limit: 1 << 20, Create: outs.create})
		r := rand.New(rand.NewPCG(seed, seed))
		var err error
		for off := 0; off < len(b) && err == nil; {
			n := 1 + r.IntN(len(b)-off)
			err = s.write(b[off:off+n], int64(off))
			off += n
		}
		if (err != nil) != (s.Err() != nil) {
			t.Errorf("write: %v, Err: %v", err, s.Err())
		}
		s.Close()
		for i, o := range outs {
			if o.closed+o.aborted != 1 {
				t.Errorf("output %d: closed %d, aborted %d", i, o.closed, o.aborted)
			}
			if o.closed == 1 {
				if _, n, err := nar.ReadIndex(&o.Buffer); err != nil || n != s.Sizes()[i] {
					t.Errorf("output %d: %d bytes, %v", i, n, err)
				}
			}
		}
	})
}

// nullOutput takes everything.
type nullOutput struct{}

func (nullOutput) Write(p []byte) (int, error) { return len(p), nil }
func (nullOutput) Close() error                { return nil }
func (nullOutput) Abort()                      {}

// BenchmarkSink writes an output of one large file, and one of many small ones,
// in blocks of 1 MiB.
func BenchmarkSink(b *testing.B) {
	for name, n := range map[string]*tree{
		"large": file(bytesOf(64 << 20)),
		"small": many(40_000, 20, file(bytesOf(1000))),
	} {
		b.Run(name, func(b *testing.B) {
			data := n.archive(b)
			data = append(data, make([]byte, -len(data)&4095)...)
			b.SetBytes(int64(len(data)))
			for b.Loop() {
				s := NewSink(SinkConfig{Outputs: 1, Limit: 1 << 40, Create: func(int) (OutputWriter, error) { return nullOutput{}, nil }})
				l, path := listenNBD(b)
				server := s.Serve(l, nil)
				c := connectNBD(b, path)
				for off := 0; off < len(data); off += 1 << 20 {
					if err := c.write(data[off:min(off+1<<20, len(data))], int64(off)); err != nil {
						b.Fatal(err)
					}
				}
				if err := server.Close(); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
