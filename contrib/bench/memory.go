package main

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/crypto/ssh"

	"nbd/nixproto"
	"nbd/nixproto/nar"
)

// resident is the memory that a process holds, in KiB: what it has written, and
// what it has mapped of files, which the kernel may drop.
type resident struct{ anon, file int }

func (r resident) String() string {
	return fmt.Sprintf("%d MiB of its own, %d MiB mapped of files", r.anon>>10, r.file>>10)
}

func (m *machine) resident() (r resident, err error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", m.cmd.Process.Pid))
	if err != nil {
		return r, err
	}
	for line := range strings.Lines(string(b)) {
		f := strings.Fields(line)
		to := map[string]*int{"RssAnon:": &r.anon, "RssFile:": &r.file}[f[0]]
		if to == nil {
			continue
		}
		if *to, err = strconv.Atoi(f[1]); err != nil {
			return r, err
		}
	}
	return r, nil
}

// dial opens a connection that is authenticated.
func (m *machine) dial() (*ssh.Client, error) {
	text, err := os.ReadFile(m.dir + "/key")
	if err != nil {
		return nil, err
	}
	key, err := ssh.ParsePrivateKey(text)
	if err != nil {
		return nil, err
	}
	host, err := os.ReadFile(m.state + "/ssh_host_ed25519_key.pub")
	if err != nil {
		return nil, err
	}
	pub, _, _, _, err := ssh.ParseAuthorizedKey(host)
	if err != nil {
		return nil, err
	}
	config := &ssh.ClientConfig{User: "bench", Auth: []ssh.AuthMethod{ssh.PublicKeys(key)}, HostKeyCallback: ssh.FixedHostKey(pub)}
	return ssh.Dial("tcp", "127.0.0.1:"+m.port, config)
}

// idleConnections tells what connections cost that do nothing.
func (b *bench) idleConnections(m *machine) error {
	before, err := m.resident()
	if err != nil {
		return err
	}
	var conns []*ssh.Client
	defer func() {
		for _, c := range conns {
			c.Close()
		}
	}()
	for i := range b.idle {
		c, err := m.dial()
		if err != nil {
			return fmt.Errorf("connection %d: %w", i, err)
		}
		conns = append(conns, c)
	}
	time.Sleep(settle)
	after, err := m.resident()
	if err != nil {
		return err
	}
	fmt.Printf("memory with %d idle connections: %s; before them: %s (%d KiB each)\n",
		b.idle, after, before, (after.anon-before.anon)/b.idle)
	return nil
}

// manyPaths tells what paths in the store cost a server that has started with
// them, and one that has just been asked for all of them.
func (b *bench) manyPaths(m *machine) error {
	paths, err := b.uploadMany(m)
	if err != nil {
		return err
	}
	uploaded, err := m.resident()
	if err != nil {
		return err
	}
	m.stop()
	if err := m.serve(); err != nil {
		return err
	}
	started, err := m.resident()
	if err != nil {
		return err
	}
	err = m.worker(func(c *nixproto.Client) error {
		valid, err := c.Do(&nixproto.QueryValidPaths{Paths: paths}, nil)
		if set, ok := valid.(*nixproto.PathSet); err == nil && (!ok || len(*set) != len(paths)) {
			err = fmt.Errorf("not all of %d paths are valid", len(paths))
		}
		return err
	})
	if err != nil {
		return err
	}
	time.Sleep(settle)
	asked, err := m.resident()
	if err != nil {
		return err
	}
	fmt.Printf("memory with %d paths in the store: %s after a start; %s when asked for all; %s when they had come\n",
		len(paths), started, asked, uploaded)
	return nil
}

// uploadMany brings b.paths paths of a few bytes in one burst.
func (b *bench) uploadMany(m *machine) ([]nixproto.StorePath, error) {
	paths := make([]nixproto.StorePath, b.paths)
	send := func(w *nixproto.Writer) error {
		w.Uint64(uint64(len(paths)))
		for i := range paths {
			var text bytes.Buffer
			archive := nar.NewWriter(&text)
			contents := fmt.Sprintf("%64d", i)
			if err := archive.File("", false, int64(len(contents))); err != nil {
				return err
			}
			if _, err := io.WriteString(archive, contents); err != nil {
				return err
			}
			if err := archive.Close(); err != nil {
				return err
			}
			sum := nixproto.SumSHA256(text.Bytes())
			paths[i] = nixproto.StorePath(fmt.Sprintf("%s/%s-path-%d", nixproto.StoreDir, sum.Base32()[:nixproto.HashPartLen], i))
			info := nixproto.PathInfo{Path: paths[i], NarHash: sum, NarSize: uint64(text.Len())}
			if i > 0 {
				info.References = paths[i-1 : i]
			}
			if err := nixproto.WritePathInfo(w, &info); err != nil {
				return err
			}
			if _, err := w.Write(text.Bytes()); err != nil {
				return err
			}
		}
		return nil
	}
	err := m.worker(func(c *nixproto.Client) error {
		_, err := c.Do(&nixproto.AddMultipleToStore{}, send)
		return err
	})
	time.Sleep(settle)
	return paths, err
}

// worker speaks the worker protocol with the machine.
func (m *machine) worker(f func(*nixproto.Client) error) error {
	conn, err := m.dial()
	if err != nil {
		return err
	}
	defer conn.Close()
	s, err := conn.NewSession()
	if err != nil {
		return err
	}
	in, err := s.StdinPipe()
	if err != nil {
		return err
	}
	out, err := s.StdoutPipe()
	if err != nil {
		return err
	}
	if err := s.Start("nix-daemon --stdio"); err != nil {
		return err
	}
	pipe := struct {
		io.Reader
		io.Writer
	}{out, in}
	c, err := nixproto.NewClient(pipe, nixproto.Hello{Version: nixproto.MaxWorker, Nix: "bench"}, nil)
	if err != nil {
		return err
	}
	return f(c)
}
