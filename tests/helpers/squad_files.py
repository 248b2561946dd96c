"""Small files in SQuAD's shape."""

import json


def article(title, *paragraphs):
    """An article; each paragraph is a context and its questions: texts, or fields to replace."""
    made = []
    for context, *questions in paragraphs:
        qas = []
        for number, question in enumerate(questions):
            fields = {"question": question} if isinstance(question, str) else question
            answers = [{"text": context[:3], "answer_start": 0}]
            qas.append({"id": f"{title}-{context[:8]}-{number}".replace(" ", "_"), "answers": answers, **fields})
        made.append({"context": context, "qas": qas})
    return {"title": title, "paragraphs": made}


def squad(path, *articles):
    path.write_text(json.dumps({"version": "1.1", "data": list(articles)}, ensure_ascii=False), encoding="utf-8")
    return path


def many(count):
    return [
        article(f"제목_{i}", (f"본문 {i}.", f"질문 {i}?", f"또 {i}?"), (f"둘째 {i}.", f"셋째 질문 {i}?"))
        for i in range(count)
    ]
