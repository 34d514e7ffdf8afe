package server

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
)

// writeAnswer writes the value of a command: a list as a JSON array of which
// each element has a line, bytes as they are, everything else as JSON in one
// line.
func writeAnswer(w io.Writer, v any) error {
	switch v := v.(type) {
	case *attached:
		defer v.log.Close()
		if _, err := io.Copy(io.Discard, v.log); err != nil {
			return err
		}
		b, err := v.end()
		if err != nil {
			return err
		}
		return writeAnswer(w, b)
	case io.ReadCloser:
		defer v.Close()
		_, err := io.Copy(w, v)
		return err
	case valueSeq:
		return writeArray(w, v)
	}
	b, err := apiJSON(v)
	if err == nil {
		_, err = w.Write(append(b, '\n'))
	}
	return err
}

// arrayChunk is how much of an array is written at once, in bytes.
const arrayChunk = 32 << 10

// writeArray writes a list. One that ends with an error is not a complete
// array.
func writeArray(w io.Writer, list valueSeq) error {
	var chunk bytes.Buffer
	n := 0
	err := list.each(func(v any) error {
		b, err := apiJSON(v)
		if err != nil {
			return err
		}
		if n++; n == 1 {
			chunk.WriteString("[\n")
		} else {
			chunk.WriteString(",\n")
		}
		chunk.Write(b)
		if chunk.Len() < arrayChunk {
			return nil
		}
		_, err = chunk.WriteTo(w)
		return err
	})
	if err != nil {
		return err
	}
	if n == 0 {
		chunk.WriteString("[]\n")
	} else {
		chunk.WriteString("\n]\n")
	}
	_, err = chunk.WriteTo(w)
	return err
}

// apiJSON encodes a value so that a terminal may print it: of control
// characters, which are in strings alone, nothing stays as it is.
func apiJSON(v any) ([]byte, error) {
	var out bytes.Buffer
	enc := json.NewEncoder(&out)
	enc.SetEscapeHTML(false)
	if err := enc.Encode(v); err != nil {
		return nil, fmt.Errorf("encode answer: %w", err)
	}
	b := bytes.TrimSuffix(out.Bytes(), []byte("\n"))
	if !bytes.ContainsFunc(b, isControl) {
		return b, nil
	}
	var clean bytes.Buffer
	for _, r := range string(b) {
		if isControl(r) {
			fmt.Fprintf(&clean, `\u%04x`, r)
		} else {
			clean.WriteRune(r)
		}
	}
	return clean.Bytes(), nil
}

// isControl reports whether a terminal may take r for more than a character:
// control characters, and those that change the direction of what follows.
func isControl(r rune) bool {
	return r < ' ' || r >= 0x7f && r < 0xa0 ||
		r == 0x200e || r == 0x200f || r >= 0x202a && r <= 0x202e || r >= 0x2066 && r <= 0x2069
}

// An apiFailure is the answer to a command that failed.
type apiFailure struct {
	Error string `json:"error"`
}
