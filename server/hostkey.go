package server

import (
	"crypto/ed25519"
	"crypto/rand"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	gossh "golang.org/x/crypto/ssh"

	"nbd/server/adminapi"
)

// HostKeyFile is the name of the host key in the state directory; its public
// half, as it stands in a known_hosts file, lies beside it with ".pub" added.
const HostKeyFile = "ssh_host_ed25519_key"

// LoadHostKey returns the host key of a state directory, making one if there
// is none, and puts back a public half that is missing.
func LoadHostKey(stateDir string) (gossh.Signer, error) {
	name := filepath.Join(stateDir, HostKeyFile)
	text, err := os.ReadFile(name)
	if errors.Is(err, fs.ErrNotExist) {
		text, err = makeHostKey(name)
	}
	if err != nil {
		return nil, fmt.Errorf("load host key: %w", err)
	}
	key, err := gossh.ParsePrivateKey(text)
	if err != nil {
		return nil, &adminapi.HintError{Err: fmt.Errorf("load host key: parse %s: %w", name, err),
			Hint: "put it back from a backup; or remove it and " + HostKeyFile + ".pub: a new one is made, which all clients have to be told (nbd setup)"}
	}
	pub := gossh.MarshalAuthorizedKey(key.PublicKey())
	if _, err := os.Stat(name + ".pub"); errors.Is(err, fs.ErrNotExist) {
		if err := writeNew(name+".pub", pub, 0o644); err != nil {
			return nil, fmt.Errorf("load host key: %w", err)
		}
	}
	return key, nil
}

func makeHostKey(name string) ([]byte, error) {
	_, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return nil, err
	}
	block, err := gossh.MarshalPrivateKey(key, "")
	if err != nil {
		return nil, err
	}
	text := pem.EncodeToMemory(block)
	return text, writeNew(name, text, 0o600)
}

// writeNew writes a file that is there whole or not at all, even after a power
// loss.
func writeNew(name string, text []byte, mode fs.FileMode) error {
	f, err := os.CreateTemp(filepath.Dir(name), "."+filepath.Base(name)+"-*")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name()) // fails once it is renamed
	_, err = f.Write(text)
	err = errors.Join(err, f.Chmod(mode), f.Sync(), f.Close())
	if err != nil {
		return fmt.Errorf("write %s: %w", name, err)
	}
	if err := os.Rename(f.Name(), name); err != nil {
		return err
	}
	dir, err := os.Open(filepath.Dir(name))
	if err != nil {
		return err
	}
	return errors.Join(dir.Sync(), dir.Close())
}
