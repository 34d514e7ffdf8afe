package vm

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
)

// certificateFiles are where distributions keep the certificates of the
// authorities that they trust: Debian and those like it, Fedora, openSUSE, Alpine,
// and Nix beside another distribution.
var certificateFiles = []string{
	"/etc/ssl/certs/ca-certificates.crt",
	"/etc/pki/tls/certs/ca-bundle.crt",
	"/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem",
	"/etc/ssl/ca-bundle.pem",
	"/etc/ssl/cert.pem",
	"/nix/var/nix/profiles/default/etc/ssl/certs/ca-bundle.crt",
}

// maxCertificates bounds such a file, in bytes; Mozilla's list has a quarter MiB.
const maxCertificates = 4 << 20

// certificates returns what builds with a network may trust, in PEM; nothing if
// this machine has none. It is read for each of them: it changes with updates.
func (c *Config) certificates() ([]byte, error) {
	if c.Certificates != "" {
		return readCertificates(c.Certificates)
	}
	for _, name := range certificateFiles {
		if text, err := readCertificates(name); !errors.Is(err, fs.ErrNotExist) {
			return text, err
		}
	}
	return nil, nil
}

func readCertificates(name string) ([]byte, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, fmt.Errorf("read certificates of authorities: %w", err)
	}
	defer f.Close() // only read from
	text, err := io.ReadAll(io.LimitReader(f, maxCertificates+1))
	if err != nil {
		return nil, fmt.Errorf("read certificates of authorities: %w", err)
	}
	if len(text) > maxCertificates {
		return nil, fmt.Errorf("%s: larger than %d MiB", name, maxCertificates>>20)
	}
	if !bytes.Contains(text, []byte("-----BEGIN CERTIFICATE-----")) {
		return nil, fmt.Errorf("%s has no certificate in PEM", name)
	}
	return text, nil
}
